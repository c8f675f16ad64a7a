# SPDX-License-Identifier: Apache-2.0
"""Which layers deserve more bits: what each loses by itself in each preset, and the best choice within a budget.

Losses of single layers add up nearly to that of all (docs/encoder-study.md), so that they can be weighed one by one.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

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


def smallest(bits: Mapping[str, float], budget: float) -> str:
    """The preset with the fewest bits per value. Raises ValueError where not even that fits."""
    name = min(bits, key=bits.__getitem__)
    if bits[name] > budget:
        raise ValueError(f"{budget:g} bits per value are too few: {name} alone has {bits[name]:g}")
    return name


def choose(found: Losses, bits: Mapping[str, float], budget: float) -> dict[int, str]:
    """A preset for each layer: at most `budget` bits per value on average, and little loss.

    bits  bits per value of each preset; every layer begins with the smallest, of several with the one that loses the
          least there. Then, again and again, the step to more bits that saves the most loss for a bit, as long as one
          fits.
    Raises ValueError where not even the smallest preset fits.
    """
    least = bits[smallest(bits, budget)]
    chosen = {layer: min((name for name in bits if bits[name] == least), key=found[layer].get) for layer in found}
    left = (budget - least) * len(found)

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
