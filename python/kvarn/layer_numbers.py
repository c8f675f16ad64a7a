# SPDX-License-Identifier: Apache-2.0
"""How presets of some layers' own are written: for vLLM's kvarn_layers and kvarn.hf.Cache alike."""

from collections.abc import Mapping
from itertools import groupby


def by_number(given: Mapping[int | str, str]) -> dict[int, str]:
    """{0: preset, "2": preset, "4-6": preset} -> the preset of each layer named.

    Raises ValueError where a key is neither a number nor a range of them, or two keys name one layer.
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"{given!r} is no mapping of layers and presets")
    pairs = [(number, name) for numbers, name in given.items() for number in _numbers(numbers)]
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"{given!r} names a layer twice")
    return found


def as_option(chosen: Mapping[int, str], default: str) -> dict[str, str]:
    """The other way round, in ranges, without the layers that have the default."""
    others = sorted((layer, name) for layer, name in chosen.items() if name != default)
    found = {}
    # Neighbours with one preset keep the difference of number and place.
    for (_, name), run in groupby(enumerate(others), key=lambda at: (at[1][0] - at[0], at[1][1])):
        numbers = [layer for _, (layer, _) in run]
        found[str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"] = name
    return found


def _numbers(key: int | str) -> range:
    first, dash, last = str(key).partition("-")
    try:
        return range(int(first), int(last if dash else first) + 1)
    except ValueError:
        raise ValueError(f'{key!r} is neither the number of a layer nor a range as "4-6"') from None
