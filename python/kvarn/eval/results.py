# SPDX-License-Identifier: Apache-2.0
"""One JSON object per run: what was measured with what, a figure for every row, and paired ratios."""

import dataclasses
import json
import subprocess
from collections.abc import Mapping
from datetime import date
from itertools import combinations, product
from pathlib import Path

import kvarn
from kvarn.eval import statistics
from kvarn.eval.measure import Scores
from kvarn.eval.rows import OWN_LAYERS, UNBALANCED, WITH_TILE, WITHOUT, Row

_NEAR_8_BITS = ("q8_0", "int8_per_token_head", "fp8")
_NEAR_4_BITS = ("fp8", "q4_0", "int4_per_token_head", "turboquant_4bit_nc, all layers", "nvfp4", "KIVI-4")
_NEAR_3_BITS = ("turboquant_k3v4_nc, all layers", "turboquant_3bit_nc, all layers", "KIVI-2")


def pairs() -> list[tuple[str, str]]:
    """Rows that are compared token by token: the encoders of every preset, layers of their own with all presets, and
    presets with what lies near."""
    near = {"kvarn_k8v4_g128": _NEAR_8_BITS, "kvarn_k4v4_g128": _NEAR_4_BITS, "kvarn_k4v2_g128": _NEAR_3_BITS}
    found = []
    for preset in kvarn.presets():
        ours = [f"{preset} {encoder}" for encoder in ("weighted", UNBALANCED, WITHOUT)]
        found += [*combinations([*ours, f"{preset} varnorm"], 2), (OWN_LAYERS, ours[0]), (OWN_LAYERS, ours[1])]
        others = [other + recent for other in near.get(preset, ()) for recent in ("", WITH_TILE)]
        found += list(product(ours, others))
    return found


def about(facts: Mapping) -> dict:
    """facts: model, text, and so on; with the day and what was run."""
    return {"date": date.today().isoformat(), "version": kvarn.__version__, "target": kvarn.target(), **facts}


class Result:
    """The object of a run over a text, which grows row by row."""

    def __init__(self, facts: Mapping):
        self.about = about(facts)
        self.rows: list[dict] = []
        self.pairs: list[dict] = []
        self._scores: dict[str, Scores] = {}

    def add(self, row: Row, scores: Scores) -> None:
        self._scores[row.name] = scores
        described = {"name": row.name, "kind": row.kind, "bits_per_value": row.bits_per_value, "recent": row.recent}
        self.rows.append(described | dataclasses.asdict(statistics.summary(scores)))
        for ours, other in pairs():
            if row.name in (ours, other) and {ours, other} <= self._scores.keys():
                both = self._scores[ours], self._scores[other]
                mean, median = statistics.mean_ratio(*both), statistics.median_ratio(*both)
                ratios = {"mean": dataclasses.asdict(mean), "median": dataclasses.asdict(median)}
                self.pairs.append({"ours": ours, "other": other} | ratios)

    def describe(self) -> dict:
        return self.about | {"rows": self.rows, "pairs": self.pairs}


def write(result: Mapping, path: Path) -> None:
    """Appears by one rename: a run that is stopped never leaves half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(_rounded(result), indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def read(path: Path) -> dict:
    """Of kvarn eval run or ask. Raises ValueError, naming the file, where it holds no such run."""
    return _read(path, "run or ask", {"model", "context", "rows", "pairs"}, {"model", "tasks", "rows"})


def layers_of(path: Path) -> tuple[str, dict[str, str]]:
    """What kvarn eval layers chose: the preset, and the layers that have another. Raises as `read`."""
    found = _read(path, "layers", {"kv_cache_dtype", "kvarn_layers"})
    return found["kv_cache_dtype"], found["kvarn_layers"]


def _read(path: Path, commands: str, *kinds: set[str]) -> dict:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); give files that kvarn eval has written") from None
    if not isinstance(result, dict) or not any(kind <= result.keys() for kind in kinds):
        raise ValueError(f"{path} is no result of kvarn eval {commands}")
    return result


def commit() -> str:
    """The short name of the commit in the current folder, marked where files differ from it."""
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "no commit"


def _rounded(x):
    """Six significant digits are more than any interval here supports."""
    if isinstance(x, float):
        return float(f"{x:.6g}")
    if isinstance(x, Mapping):
        return {key: _rounded(value) for key, value in x.items()}
    return [_rounded(value) for value in x] if isinstance(x, list | tuple) else x
