# SPDX-License-Identifier: Apache-2.0
"""Presets of some layers' own, as `kvarn eval layers` prints them: for vLLM's kvarn_layers and kvarn.hf.Cache alike."""

from collections.abc import Mapping


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


def _numbers(key: int | str) -> range:
    first, dash, last = str(key).partition("-")
    try:
        return range(int(first), int(last if dash else first) + 1)
    except ValueError:
        raise ValueError(f'{key!r} is neither the number of a layer nor a range as "4-6"') from None
