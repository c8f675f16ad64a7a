# SPDX-License-Identifier: Apache-2.0
"""The loop of `kvarn eval layers`: every layer by itself, the choice, and what it is worth on other contexts."""

import dataclasses
import json

import kvarn
from kvarn.cli.console import out
from kvarn.cli.eval_run import folder, load, progress
from kvarn.cli.model_config import full_layers
from kvarn.eval import layers, results, statistics
from kvarn.eval.attention import Past
from kvarn.eval.caches import Layered, Packed
from kvarn.eval.run import FIRST_SCORED, Runner


def layers_run(path, text, name, presets, budget, contexts, check, length, device, dtype, where, work) -> None:
    """kvarn eval layers; arguments as there."""
    model, facts = load(path, name, device, dtype)
    packed = full_layers(model.net.config.to_dict())
    bits = {preset: _bits(preset, facts) for preset in presets}
    layers.choose({layer: dict.fromkeys(bits, 0.0) for layer in packed}, bits, budget)  # before anything is measured
    caches = {preset: Packed(preset, "weighted", model.feedback) for preset in bits}
    about = model, text, contexts, length, Past.DECODED, folder(work)
    with progress(len(packed) * len(bits) * contexts) as advance:
        found = layers.losses(Runner(*about), packed, caches, lambda: advance("every layer by itself"))
    chosen = layers.choose(found, bits, budget)
    smallest = min(bits, key=bits.__getitem__)
    option = layers.as_option(chosen, smallest)
    facts |= {"text": text.name, "context": length, "contexts": contexts, "first_scored": FIRST_SCORED}
    told = results.about(facts) | {"losses": found, "kvarn_layers": option, "rows": []}
    for layer in packed:
        out.print(f"{layer:>4}  " + "  ".join(f"{name} {found[layer][name]:.6f}" for name in bits), highlight=False)
    mean = sum(bits[name] for name in chosen.values()) / len(chosen)
    rows = [(name, bits[name], cache) for name, cache in caches.items()]
    rows.append(
        (
            f"{smallest} and layers of their own",
            mean,
            Layered({at: caches[name] for at, name in chosen.items()}, caches[smallest]),
        )
    )
    with progress(len(rows) * check) as advance:
        runner = Runner(model, text, check, length, Past.DECODED, folder(work), skipped=contexts)
        for row, size, cache in rows:
            scores = runner.run(cache, lambda row=row: advance(row))
            summary = statistics.summary(scores)
            told["rows"].append({"name": row, "bits_per_value": size} | dataclasses.asdict(summary))
            results.write(told, where)
            shown = f"{row}, {size:.3f} bits per value: mean KLD {summary.mean.value:.5f}"
            out.print(f"{shown}, median {summary.median.value:.5f}", highlight=False)
    out.print(
        f"--kv-cache-dtype {smallest} --additional-config '{json.dumps({'kvarn_layers': option})}'",
        soft_wrap=True,
        markup=False,
        highlight=False,
    )
    out.print(f"written: {where}", markup=False, highlight=False)


def _bits(preset: str, facts: dict) -> float:
    return kvarn.Layout(preset, head_dim=facts["head_dim"], kv_heads=facts["kv_heads"]).bits_per_value
