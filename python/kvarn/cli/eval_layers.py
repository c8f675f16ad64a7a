# SPDX-License-Identifier: Apache-2.0
"""The loop of `kvarn eval layers`: every layer by itself, the choice, and what it is worth on other contexts."""

import dataclasses
import json
from collections.abc import Mapping

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

import kvarn
from kvarn.cli.console import out
from kvarn.cli.eval_run import folder, load, progress
from kvarn.cli.model_config import full_layers
from kvarn.eval import layers, results, statistics
from kvarn.eval.attention import Past
from kvarn.eval.caches import Packed
from kvarn.eval.rows import own_layers
from kvarn.eval.run import FIRST_SCORED, Runner
from kvarn.layer_numbers import as_option


def layers_run(path, text, name, presets, budget, contexts, check, length, device, dtype, where, work) -> None:
    """kvarn eval layers; arguments as there."""
    model, facts = load(path, name, device, dtype)
    packed = full_layers(model.net.config.to_dict())
    bits = {preset: _bits(preset, facts) for preset in presets}
    smallest = layers.smallest(bits, budget)
    caches = {preset: Packed(preset, "weighted", model.feedback()) for preset in bits}
    # Cut together: the same text never has a context in both.
    weighing, checking = Runner(model, text, contexts + check, length, Past.DECODED, folder(work)).parted(contexts)
    with progress(len(packed) * len(bits) * contexts) as advance:
        found = layers.losses(weighing, packed, caches, lambda: advance("every layer by itself"))
    chosen = layers.choose(found, bits, budget)
    option = as_option(chosen, smallest)
    out.print(_table(found, chosen, bits))
    facts |= {
        "text": text.name,
        "context": length,
        "contexts": check,
        "skipped": contexts,
        "first_scored": FIRST_SCORED,
    }
    choice = {"kv_cache_dtype": smallest, "kvarn_layers": option}
    told = results.about(facts) | {"losses": found} | choice | {"rows": []}
    own = own_layers(facts["head_dim"], facts["kv_heads"], packed, smallest, option, model.feedback())
    rows = [(preset, bits[preset], cache) for preset, cache in caches.items()]
    rows.append((own.name, own.bits_per_value, own.cache))
    with progress(len(rows) * check) as advance:
        for row, size, cache in rows:
            summary = statistics.summary(checking.run(cache, lambda row=row: advance(row)))
            told["rows"].append({"name": row, "bits_per_value": size} | dataclasses.asdict(summary))
            results.write(told, where)
            _tell(f"{row}, {size:.3f} bits: mean KLD {summary.mean.value:.5f}, median {summary.median.value:.5f}")
    _tell(f"--kv-cache-dtype {smallest} --additional-config '{json.dumps({'kvarn_layers': option})}'")
    _tell(f"written: {where}; kvarn eval run and ask take it as --layers")


def _tell(line: str) -> None:
    out.print(line, soft_wrap=True, markup=False, highlight=False)


def _table(found: layers.Losses, chosen: Mapping[int, str], bits: Mapping[str, float]) -> Table:
    """What each layer loses by itself; its choice in bold."""
    table = Table(title="mean KLD of a layer by itself", box=SIMPLE_HEAD)
    for name in ("layer", *bits):
        table.add_column(name.removeprefix("kvarn_"), justify="right")
    for layer, of_layer in found.items():
        shown = ((f"{of_layer[name]:.6f}", "bold" if name == chosen[layer] else "") for name in bits)
        table.add_row(str(layer), *(Text(*each) for each in shown))
    return table


def _bits(preset: str, facts: dict) -> float:
    return kvarn.Layout(preset, head_dim=facts["head_dim"], kv_heads=facts["kv_heads"]).bits_per_value
