# SPDX-License-Identifier: Apache-2.0
"""K's codes rounded for the queries to come (docs/encoder-study.md), by where the energy of queries is from.

    python bench/accuracy/feedback.py MODEL --name NAME --text TEXT --other OTHER --contexts 2 --results FILE

Energies come from the `weights` alone, from another `text`, from `random` tokens, the model run once without a cache,
or so but with attention that gives zeros, as kvarn does it (`model`, kvarn.energy); `balanced` is that with keys
divided by their balance, as it is by default. Beside them no feedback, `varnorm` and fp8, all on the same tokens.
Finished contexts stay in --work.
"""

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import torch
from kvarn import energy
from kvarn.eval import measure, results, statistics, text
from kvarn.eval.attention import Past, exact
from kvarn.eval.caches import Packed, Simulated
from kvarn.eval.model import Model
from kvarn.eval.run import Runner
from kvarn.hf.feedback import feedback
from kvarn.rivals import RIVALS, Recent


def measured(net, contexts) -> dict[int, torch.Tensor]:
    """Energies of the queries of every packed layer, the model run on `contexts` without a cache."""
    found: dict[int, torch.Tensor] = {}

    def cache(q, k, v, scale, layer):
        found[layer.index] = found.get(layer.index, 0) + energy.of_queries(q, k.shape[1])
        return exact(q, k, v, scale)

    for tokens in contexts:
        measure.hidden_states(net, np.asarray(tokens), cache)
    return found


def from_weights(net, layers: list[int]) -> dict[int, torch.Tensor]:
    """Rows of W_q times the norm's weight, squared, and the bias; both channels of a RoPE pair alike."""
    found = {}
    for number in layers:
        layer = net.base_model.layers[number]
        module, ones = layer.self_attn, torch.ones(1, net.config.get_text_config().hidden_size)
        with torch.inference_mode():
            squares = (module.q_proj.weight * layer.input_layernorm(ones)).square().sum(1)
            if module.q_proj.bias is not None:
                squares = squares + module.q_proj.bias.square()
            heads = squares.unflatten(0, (-1, module.head_dim))
            if hasattr(module, "q_norm"):
                norm = module.q_norm(torch.ones(1, module.head_dim))
                heads = heads / heads.mean(1, keepdim=True) * norm.square()
            groups = heads.unflatten(0, (module.k_proj.out_features // module.head_dim, -1)).mean(1)
            found[number] = groups.unflatten(1, (2, -1)).mean(1).repeat(1, 2)
    return found


def sources(model: Model, other: Path) -> dict[str, dict[int, energy.Seen]]:
    """By layer, under the names of the tables."""
    on_text = measured(model.net, text.contexts(other, model.tokenizer, 2, 1024)[:, :-1])
    random = energy.tokens(model.net.config.get_text_config().vocab_size)[None]
    found = {
        "weights": from_weights(model.net, sorted(on_text)),
        "text": on_text,
        "random": measured(model.net, random),
    }
    plain = {
        source: {layer: energy.Seen(its, torch.ones_like(its)) for layer, its in by.items()}
        for source, by in found.items()
    }
    return plain | {"model": feedback(model.net, balanced=False), "balanced": feedback(model.net)}


def caches(presets: list[str], by_source: dict) -> dict:
    """Under the names of the tables."""
    found = {"fp8": Simulated(RIVALS["fp8"], Recent.NONE)}
    for name in (f"kvarn_{preset}_g128" for preset in presets):
        found |= {f"{name} {encoder}": Packed(name, encoder) for encoder in ("varnorm", "weighted")}
        for source, its in by_source.items():
            found[f"{name} weighted, {source}"] = Packed(name, "weighted", its)
    return found


def ratios(name: str, scores: dict) -> dict:
    """Mean and median of a row over those of the rows that goals name."""
    preset = name.partition(" ")[0]
    found = {}
    for other in (f"{preset} weighted", f"{preset} varnorm", "fp8"):
        if other in scores and other != name and name != "fp8":
            both = scores[name], scores[other]
            mean, median = statistics.mean_ratio(*both), statistics.median_ratio(*both)
            found[other] = {"mean": dataclasses.asdict(mean), "median": dataclasses.asdict(median)}
    return found


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("model", type=Path)
    asked.add_argument("--name", required=True)
    asked.add_argument("--text", type=Path, required=True)
    asked.add_argument("--other", type=Path, required=True, help="the text that `text` energies are measured on")
    asked.add_argument("--contexts", type=int, default=2)
    asked.add_argument("--length", type=int, default=2048)
    asked.add_argument("--presets", nargs="+", default=["k4v4", "k4v2", "k2v2"])
    asked.add_argument("--rows", nargs="+", default=[""], help="only rows whose names end so")
    asked.add_argument("--work", type=Path, default=Path("build/feedback"))
    asked.add_argument("--results", type=Path, required=True)
    given = asked.parse_args()
    commit, model = results.commit(), Model(given.model)
    runner = Runner(model, given.text, given.contexts, given.length, Past.DECODED, given.work)
    about = {"commit": commit, "model": given.name, "text": given.text.name, "text_by": model.text_by}
    about |= {"context": given.length, "contexts": given.contexts, "where": model.where}
    about |= {"other": given.other.name}
    scores, rows = {}, []
    for name, cache in caches(given.presets, sources(model, given.other)).items():
        if not name.endswith(tuple(given.rows)):
            continue
        scores[name] = runner.run(cache)
        summary = dataclasses.asdict(statistics.summary(scores[name]))
        rows.append({"name": name} | summary | {"over": ratios(name, scores)})
        results.write(results.about(about) | {"study": "feedback", "rows": rows}, given.results)
        over = {
            other: [round(ratio["mean"][x], 2) for x in ("value", "low", "high")]
            for other, ratio in rows[-1]["over"].items()
        }
        print(f"{name}: mean {summary['mean']['value']:.5f}, median {summary['median']['value']:.5f}, over {over}")


if __name__ == "__main__":
    main()
