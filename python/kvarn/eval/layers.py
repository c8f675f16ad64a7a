# SPDX-License-Identifier: Apache-2.0
"""Which layers deserve more bits: what each loses in each preset, and the best choice within a budget.

Losses of single layers add up nearly to that of all (docs/encoder-study.md), so that they can be weighed one by one.
Nearly: errors of 2-bit keys in several layers lose more together. So layers are weighed again beside the choice made.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from kvarn.eval.caches import Layered, Packed, Plain
from kvarn.eval.run import Runner

# Mean KL divergence by layer, by preset.
Losses = Mapping[int, Mapping[str, float]]


@dataclass(frozen=True)
class Round:
    """What layers lost, what was chosen by it, and the mean KL divergence of that choice on the same contexts."""

    losses: Losses
    chosen: Mapping[int, str]
    mean: float


def rounds(
    runner: Runner,
    layers: Sequence[int],
    presets: Mapping[str, Packed],
    bits: Mapping[str, float],
    budget: float,
    most: int,
    done: Callable[[], None] = lambda: None,
) -> Iterator[Round]:
    """Chooses by what every layer loses by itself, then by what it loses beside the choice before, as long as that
    gains something and at most `most` times. Calls `done` after each context of each."""
    beside: Mapping[int, str] = {}
    least = float("inf")
    for _ in range(most):
        found = losses(runner, layers, presets, beside, done)
        beside = choose(found, bits, budget)
        made = Round(found, beside, _mean(runner, presets, beside))
        yield made
        if made.mean >= least:
            return
        least = made.mean


def losses(
    runner: Runner,
    layers: Sequence[int],
    presets: Mapping[str, Packed],
    beside: Mapping[int, str],
    done: Callable[[], None] = lambda: None,
) -> dict[int, dict[str, float]]:
    """With each layer in each preset and all others in those of `beside`, or as they are."""
    return {
        layer: {name: _mean(runner, presets, {**beside, layer: name}, done) for name in presets} for layer in layers
    }


def _mean(runner: Runner, presets: Mapping[str, Packed], chosen: Mapping[int, str], done=lambda: None) -> float:
    cache = Layered({layer: presets[name] for layer, name in chosen.items()}, Plain())
    return float(runner.run(cache, done).kld.mean())


def smallest(bits: Mapping[str, float], budget: float) -> str:
    """The preset with the fewest bits per value. Raises ValueError where not even that fits."""
    name = min(bits, key=bits.__getitem__)
    if bits[name] > budget:
        raise ValueError(f"{budget:g} bits per value are too few: {name} alone has {bits[name]:g}")
    return name


def choose(found: Losses, bits: Mapping[str, float], budget: float) -> dict[int, str]:
    """A preset for each layer: at most `budget` bits per value on average, and little loss.

    bits  bits per value of each preset; the smallest is where every layer begins. Then, again and again, the step to
          more bits that saves the most loss for a bit, as long as one fits.
    Raises ValueError where not even the smallest preset fits.
    """
    base = smallest(bits, budget)
    chosen = dict.fromkeys(found, base)
    left = (budget - bits[base]) * len(found)

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
