# SPDX-License-Identifier: Apache-2.0
"""Which layers deserve more bits: what each loses by itself in each preset, and the best choice within a budget.

Losses of single layers add up nearly to that of all (docs/encoder-study.md), so that they can be weighed one by one.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby

from kvarn.eval.caches import Layered, Packed, Plain
from kvarn.eval.run import Runner

# Mean KL divergence by layer, by preset.
Losses = Mapping[int, Mapping[str, float]]


def losses(
    runner: Runner, layers: Sequence[int], presets: Mapping[str, Packed], done: Callable[[], None] = lambda: None
) -> dict[int, dict[str, float]]:
    """Of each layer in each preset while all others keep what they have; calls `done` after each context of each."""
    return {
        layer: {
            name: float(runner.run(Layered({layer: packed}, Plain()), done).kld.mean())
            for name, packed in presets.items()
        }
        for layer in layers
    }


def choose(found: Losses, bits: Mapping[str, float], budget: float) -> dict[int, str]:
    """A preset for each layer: at most `budget` bits per value on average, and little loss.

    bits  bits per value of each preset; the smallest is where every layer begins. Then, again and again, the step to
          more bits that saves the most loss for a bit, as long as one fits.
    Raises ValueError where not even the smallest preset fits.
    """
    smallest = min(bits, key=bits.__getitem__)
    chosen = dict.fromkeys(found, smallest)
    left = (budget - bits[smallest]) * len(found)
    if left < 0:
        raise ValueError(f"{budget:g} bits per value are too few: {smallest} alone has {bits[smallest]:g}")

    def steps() -> Iterator[tuple[float, float, int, str]]:
        for layer, now in chosen.items():
            for name in bits:
                more, saved = bits[name] - bits[now], found[layer][now] - found[layer][name]
                if 0 < more <= left and saved > 0:
                    yield saved / more, more, layer, name

    while best := max(steps(), default=None):
        _, more, layer, name = best
        chosen[layer] = name
        left -= more
    return chosen


def as_option(chosen: Mapping[int, str], default: str) -> dict[str, str]:
    """For vLLM's kvarn_layers: {"1": preset, "4-6": preset, ..}, without the layers that have the default."""
    others = sorted((layer, name) for layer, name in chosen.items() if name != default)
    found = {}
    # Neighbours with one preset keep the difference of number and place.
    for (_, name), run in groupby(enumerate(others), key=lambda at: (at[1][0] - at[0], at[1][1])):
        numbers = [layer for _, (layer, _) in run]
        found[str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"] = name
    return found
