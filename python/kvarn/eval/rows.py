# SPDX-License-Identifier: Apache-2.0
"""Which caches make up a run, under the names that they have in the tables."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch

import kvarn
from kvarn.energy import Seen
from kvarn.eval.attention import Cache
from kvarn.eval.caches import Layered, Packed, Plain, Simulated
from kvarn.layer_numbers import by_number
from kvarn.rivals import RIVALS, Recent

# The row that others are paired with.
EXACT = "bf16"
# Rounds the newest tokens too, unlike kvarn; with its own tile raw, as kvarn has it, a format is compared as a format.
WITH_TILE = ", own tile raw"
# The weighted encoder with feedback but keys that are not balanced, as vLLM has it on GPUs; and without either.
UNBALANCED, WITHOUT = "feedback", "fit"
# The row of a model whose layers have presets of their own, as kvarn eval layers chooses them.
OWN_LAYERS = "layers of their own"


@dataclass(frozen=True)
class Row:
    """A cache under its name. kind: "16-bit", "kvarn", or "rival"; recent: what it reads raw (kvarn.rivals.Recent)."""

    name: str
    kind: str
    bits_per_value: float
    recent: str
    cache: Cache


def rows(
    head_dim: int,
    kv_heads: int,
    full: Sequence[int],
    layers: int,
    only: str = "*",
    feedback: Callable[[bool], Mapping[int, Seen]] | None = None,
) -> list[Row]:
    """All rows whose name matches one of the patterns in `only` (shell wildcards, separated by ";").

    full, layers  the numbers of the model's full-attention layers, which are packed, and how many layers there are
    feedback      gives that of kvarn.hf.feedback, balanced or not: the weighted encoder has it as in serving, beside
                  rows without. Called only where a row that was asked for has it: the model has to run for it
    Raises ValueError where a pattern matches nothing.
    """
    patterns = [pattern.strip() for pattern in only.split(";")]

    def asked(name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in patterns)

    found = [Row(EXACT, "16-bit", 16, "none", Plain(torch.bfloat16))]
    for preset in kvarn.presets():
        bits = kvarn.Layout(preset, head_dim=head_dim, kv_heads=kv_heads).bits_per_value
        packed = {encoder: Packed(preset, encoder) for encoder in kvarn.ENCODERS}
        if feedback is not None:
            packed[UNBALANCED] = packed[WITHOUT] = packed["weighted"]
            for encoder, balanced in (("weighted", True), (UNBALANCED, False)):
                if asked(f"{preset} {encoder}"):
                    packed[encoder] = Packed(preset, "weighted", feedback(balanced))
        for encoder, cache in packed.items():
            found.append(Row(f"{preset} {encoder}", "kvarn", bits, Recent.TILE.value, cache))
    for name, rival in RIVALS.items():
        bits = rival.mean_bits(head_dim, full, layers)
        found.append(Row(name, "rival", bits, rival.recent.value, Simulated(rival, rival.recent)))
        if rival.recent is Recent.NONE:
            simulated = Simulated(rival, Recent.TILE)
            found.append(Row(name + WITH_TILE, "rival", bits, Recent.TILE.value, simulated))
    for pattern in patterns:
        if not any(fnmatchcase(row.name, pattern) for row in found):
            raise ValueError(f"no row is called {pattern!r}; there are: " + "; ".join(row.name for row in found))
    return [row for row in found if asked(row.name)]


def own_layers(
    head_dim: int,
    kv_heads: int,
    full: Sequence[int],
    preset: str,
    layers: Mapping[str, str],
    feedback: Mapping[int, Seen],
) -> Row:
    """A model whose layers have presets of their own; preset, layers: as vLLM's flag and kvarn_layers have them.

    Raises ValueError where these are not layers of the model that are packed.
    """
    own = by_number(layers)
    if lacking := sorted(own.keys() - set(full)):
        raise ValueError(
            f"layers {lacking} have presets of their own; packed are {list(full)}: another model's choice?"
        )
    packed = {name: Packed(name, "weighted", feedback) for name in (preset, *own.values())}
    bits = [
        kvarn.Layout(own.get(number, preset), head_dim=head_dim, kv_heads=kv_heads).bits_per_value for number in full
    ]
    cache = Layered({number: packed[name] for number, name in own.items()}, packed[preset])
    return Row(OWN_LAYERS, "kvarn", sum(bits) / len(bits), Recent.TILE.value, cache)
