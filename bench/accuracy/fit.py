# SPDX-License-Identifier: Apache-2.0
"""K fitted at every width, from its full range (docs/encoder-study.md), in real models.

    python bench/accuracy/fit.py MODEL --name NAME --text TEXT --contexts 3 --presets k4v4 k4v2 --results FILE

Beside each fit the same preset as it is packed today, weighted and varnorm, and fp8, all on the same tokens. Fits are
computed by the numpy reference and attended in float32, the own tile raw. Finished contexts are kept in --work.
"""

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from kvarn.eval import results, statistics
from kvarn.eval.attention import Layer, Past
from kvarn.eval.caches import TILE, Packed, Simulated
from kvarn.eval.model import Model
from kvarn.eval.run import Runner
from kvarn.reference.arithmetic import f16, hadamard
from kvarn.reference.encoders import NARROWING, Grid, fit_keys, fit_values
from kvarn.rivals import RIVALS, Recent


@dataclass(frozen=True)
class Fitted:
    """A preset in g128 with K fitted: start, the share of a channel's range to start from; rounds of column refits."""

    k_bits: int
    v_bits: int
    start: float
    rounds: int = 2

    def __call__(self, q, k, v, scale: float, layer: Layer) -> torch.Tensor:
        packed_k, packed_v = self.packed(k, v)
        tile = Simulated(None, Recent.TILE)._tile
        return torch.cat([tile(q, k, v, packed_k, packed_v, scale, first) for first in range(0, len(q), TILE)])

    def packed(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[tokens, heads, head_dim] -> the same read back; an unfinished tile as it is."""
        tiles = len(k) // TILE
        keys, values = (_tiles(x, tiles) for x in (k, v))
        with np.errstate(all="ignore"):
            grids = fit_keys(keys, values, self.k_bits, self.start, self.rounds), fit_values(values, self.v_bits)
        read = _decoded(grids[0]).swapaxes(1, 2), _decoded(grids[1])
        return tuple(torch.cat([_tokens(y, tiles), x[tiles * TILE :]]) for x, y in zip((k, v), read, strict=True))


def _tiles(x: torch.Tensor, tiles: int) -> np.ndarray:
    """Rotated and rounded to binary16: [tiles * heads][tile][head_dim]."""
    rows = f16(x[: tiles * TILE].numpy()).reshape(tiles, TILE, *x.shape[1:]).swapaxes(1, 2)
    return f16(hadamard(rows.reshape(-1, TILE, x.shape[-1])))


def _decoded(grid: Grid) -> np.ndarray:
    return (grid.codes * grid.scale + grid.zero) * grid.column


def _tokens(x: np.ndarray, tiles: int) -> torch.Tensor:
    rows = hadamard(x).reshape(tiles, -1, TILE, x.shape[-1]).swapaxes(1, 2)
    return torch.from_numpy(np.ascontiguousarray(rows.reshape(tiles * TILE, -1, x.shape[-1])))


def caches(presets: list[str], rounds: list[int]) -> dict:
    """Under the names of the tables."""
    found = {"fp8": Simulated(RIVALS["fp8"], Recent.NONE)}
    for preset in presets:
        name, k_bits, v_bits = f"kvarn_{preset}_g128", int(preset[1]), int(preset[3])
        found |= {f"{name} {encoder}": Packed(name, encoder) for encoder in ("weighted", "varnorm")}
        start = NARROWING[2] if k_bits == 2 else 1.0
        found |= {f"{name} fit, {count} rounds": Fitted(k_bits, v_bits, start, count) for count in rounds}
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
    asked.add_argument("--contexts", type=int, default=3)
    asked.add_argument("--length", type=int, default=2048)
    asked.add_argument("--presets", nargs="+", default=["k4v4", "k4v2"])
    asked.add_argument("--rounds", nargs="+", type=int, default=[2])
    asked.add_argument("--work", type=Path, default=Path("build/fit"))
    asked.add_argument("--results", type=Path, required=True)
    given = asked.parse_args()
    commit, model = results.commit(), Model(given.model)
    runner = Runner(model, given.text, given.contexts, given.length, Past.DECODED, given.work)
    about = {"commit": commit, "model": given.name, "text": given.text.name, "text_by": model.text_by}
    about |= {"context": given.length, "contexts": given.contexts, "where": model.where}
    scores, rows = {}, []
    for name, cache in caches(given.presets, given.rounds).items():
        scores[name] = runner.run(cache)
        summary = dataclasses.asdict(statistics.summary(scores[name]))
        rows.append({"name": name} | summary | {"over": ratios(name, scores)})
        results.write(results.about(about) | {"study": "K fitted", "fits": rows}, given.results)
        over = {other: round(ratio["mean"]["value"], 2) for other, ratio in rows[-1]["over"].items()}
        print(f"{name}: mean {summary['mean']['value']:.5f}, median {summary['median']['value']:.5f}, over {over}")


if __name__ == "__main__":
    main()
