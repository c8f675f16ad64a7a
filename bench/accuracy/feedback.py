# SPDX-License-Identifier: Apache-2.0
"""K fitted at every width, and its codes rounded for the queries to come (docs/encoder-study.md), in real models.

    python bench/accuracy/feedback.py MODEL --name NAME --text TEXT --other OTHER --contexts 2 --results FILE

Energies of queries come from the `weights` alone, from another `text`, from `random` tokens, the model run once without
a cache, or so but with attention that gives zeros, as kvarn does it (`model`, kvarn.energy). Beside them FIT alone, the
presets as the library packs them, and fp8, all on the same tokens. Encodings are computed by the numpy reference and
attended in float32, the own tile raw. Finished contexts stay in --work.
"""

import argparse
import dataclasses
import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from kvarn import energy
from kvarn.eval import measure, results, statistics, text
from kvarn.eval.attention import Layer, Past, exact
from kvarn.eval.caches import TILE, Packed, Simulated
from kvarn.eval.model import Model
from kvarn.eval.run import Runner
from kvarn.reference.arithmetic import f16, hadamard
from kvarn.reference.encoders import Grid, weighted
from kvarn.rivals import RIVALS, Recent


@dataclass(frozen=True)
class Fitted:
    """A preset in g128 with K fitted, and its codes chosen with `feedback`, by layer [kv_heads, D, D]; None: without.

    source  names `feedback` and what it holds: finished contexts are kept under it
    """

    k_bits: int
    v_bits: int
    source: str = ""
    feedback: dict | None = field(default=None, repr=False, compare=False)

    def __call__(self, q, k, v, scale: float, layer: Layer) -> torch.Tensor:
        packed_k, packed_v = self.packed(k, v, layer.index)
        tile = Simulated(None, Recent.TILE)._tile
        return torch.cat([tile(q, k, v, packed_k, packed_v, scale, first) for first in range(0, len(q), TILE)])

    def packed(self, k: torch.Tensor, v: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """[tokens, heads, head_dim] -> the same read back; an unfinished tile as it is."""
        tiles = len(k) // TILE
        keys, values = (_tiles(x, tiles) for x in (k, v))
        with np.errstate(all="ignore"):
            grids = weighted(keys, values, self.k_bits, self.v_bits)
        if self.feedback is not None:
            choose(grids[0], keys.swapaxes(1, 2), self.feedback[layer], 2**self.k_bits - 1)
        read = _decoded(grids[0]).swapaxes(1, 2), _decoded(grids[1])
        return tuple(torch.cat([_tokens(y, tiles), x[tiles * TILE :]]) for x, y in zip((k, v), read, strict=True))


def choose(grid: Grid, keys: np.ndarray, feedback: np.ndarray, qmax: int) -> None:
    """Codes of K channel by channel, from the last to the first; keys [tiles * heads][D][G], heads inner."""
    heads, head_dim = feedback.shape[:2]
    k, s, z, c = (
        torch.from_numpy(np.ascontiguousarray(x)).unflatten(0, (-1, heads))
        for x in (keys, grid.scale, grid.zero, grid.column)
    )
    y, steps, codes = k.clone(), torch.from_numpy(feedback), torch.empty_like(k)
    for i in range(head_dim - 1, -1, -1):
        its, its_s, its_z = y[:, :, i] / c[:, :, 0], s[:, :, i], z[:, :, i]
        codes[:, :, i] = ((its - its_z) / its_s.clamp_min(1e-10)).round().clamp(0, qmax)
        wrong = (codes[:, :, i] * its_s + its_z) * c[:, :, 0] - k[:, :, i]
        y[:, :, :i] -= steps[:, :i, i, None] * wrong[:, :, None]
    grid.codes = codes.flatten(0, 1).numpy()


def feedback_of(energies: np.ndarray, damping: float = 0.1) -> np.ndarray:
    """[kv_heads, D] -> float32 [kv_heads, D, D]: R's rows over their diagonal, R upper and R^T R the metric."""
    head_dim = energies.shape[-1]
    rotation = hadamard(np.eye(head_dim))
    metric = (rotation * energies[:, None].astype(np.float64)) @ rotation.T
    metric += damping * energies.mean(-1)[:, None, None] * np.eye(head_dim)
    upper = np.linalg.cholesky(metric).swapaxes(1, 2)
    return (upper / np.diagonal(upper, axis1=1, axis2=2)[:, :, None]).astype(np.float32)


def _tiles(x: torch.Tensor, tiles: int) -> np.ndarray:
    """Rotated and rounded to binary16: [tiles * heads][tile][head_dim]."""
    rows = f16(x[: tiles * TILE].numpy()).reshape(tiles, TILE, *x.shape[1:]).swapaxes(1, 2)
    return f16(hadamard(rows.reshape(-1, TILE, x.shape[-1])))


def _decoded(grid: Grid) -> np.ndarray:
    return (grid.codes * grid.scale + grid.zero) * grid.column


def _tokens(x: np.ndarray, tiles: int) -> torch.Tensor:
    rows = hadamard(x).reshape(tiles, -1, TILE, x.shape[-1]).swapaxes(1, 2)
    return torch.from_numpy(np.ascontiguousarray(rows.reshape(tiles * TILE, -1, x.shape[-1])))


def measured(net, contexts, attend=exact) -> dict[int, np.ndarray]:
    """Energies of the queries of every packed layer, the model run on `contexts` with `attend`."""
    found: dict[int, np.ndarray] = {}

    def cache(q, k, v, scale, layer):
        found[layer.index] = found.get(layer.index, 0) + energy.of_queries(q, k.shape[1]).numpy()
        return attend(q, k, v, scale)

    for tokens in contexts:
        measure.hidden_states(net, np.asarray(tokens), cache)
    return found


def from_weights(net, layers: list[int]) -> dict[int, np.ndarray]:
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
            found[number] = groups.unflatten(1, (2, -1)).mean(1).repeat(1, 2).numpy()
    return found


def sources(model: Model, other: Path) -> dict[str, dict[int, np.ndarray]]:
    """Energies by layer, under the names of the tables."""
    on_text = measured(model.net, text.contexts(other, model.tokenizer, 2, 1024)[:, :-1])
    random = energy.tokens(model.net.config.get_text_config().vocab_size)[None]
    found = {"weights": from_weights(model.net, sorted(on_text)), "text": on_text}
    found |= {"random": measured(model.net, random)}
    return found | {"model": measured(model.net, random, lambda q, k, v, scale: torch.zeros_like(q))}


def caches(presets: list[str], energies: dict, damping: float) -> dict:
    """Under the names of the tables."""
    found = {"fp8": Simulated(RIVALS["fp8"], Recent.NONE)}
    feedbacks = {name: {layer: feedback_of(its, damping) for layer, its in by.items()} for name, by in energies.items()}
    for preset in presets:
        name, k_bits, v_bits = f"kvarn_{preset}_g128", int(preset[1]), int(preset[3])
        found |= {f"{name} {encoder}": Packed(name, encoder) for encoder in ("weighted", "varnorm")}
        found[f"{name} fit"] = Fitted(k_bits, v_bits)
        for source, by in feedbacks.items():
            digest = hashlib.sha256(b"".join(x.tobytes() for x in by.values())).hexdigest()[:16]
            found[f"{name} fit, {source}"] = Fitted(k_bits, v_bits, f"{source} {digest}", by)
    return found


def ratios(name: str, scores: dict) -> dict:
    """Mean and median of a row over those of the rows that goals name."""
    preset = name.partition(" ")[0]
    found = {}
    for other in (f"{preset} fit", f"{preset} weighted", f"{preset} varnorm", "fp8"):
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
    asked.add_argument("--damping", type=float, default=0.1)
    asked.add_argument("--work", type=Path, default=Path("build/feedback"))
    asked.add_argument("--results", type=Path, required=True)
    given = asked.parse_args()
    commit, model = results.commit(), Model(given.model)
    runner = Runner(model, given.text, given.contexts, given.length, Past.DECODED, given.work)
    about = {"commit": commit, "model": given.name, "text": given.text.name, "text_by": model.text_by}
    about |= {"context": given.length, "contexts": given.contexts, "where": model.where}
    about |= {"other": given.other.name, "damping": given.damping}
    scores, rows = {}, []
    for name, cache in caches(given.presets, sources(model, given.other), given.damping).items():
        if not name.endswith(tuple(given.rows)):
            continue
        scores[name] = runner.run(cache)
        summary = dataclasses.asdict(statistics.summary(scores[name]))
        rows.append({"name": name} | summary | {"over": ratios(name, scores)})
        results.write(results.about(about) | {"study": "K fitted, with feedback", "fits": rows}, given.results)
        over = {
            other: [round(ratio["mean"][x], 2) for x in ("value", "low", "high")]
            for other, ratio in rows[-1]["over"].items()
        }
        print(f"{name}: mean {summary['mean']['value']:.5f}, median {summary['median']['value']:.5f}, over {over}")


if __name__ == "__main__":
    main()
