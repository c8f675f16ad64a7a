# SPDX-License-Identifier: Apache-2.0
"""From the scores of tokens to a row of the table. Intervals are 95 %, by bootstrap over blocks of 128 tokens.

Neighbouring tokens share their history and so their error; blocks of the tile's size keep that dependence together.
"""

from dataclasses import dataclass

import numpy as np

from kvarn.quality.measure import Scores

BLOCK = 128
RESAMPLES = 2000
SEED = 20260603


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Summary:
    tokens: int
    mean: float
    trimmed: float
    median: float
    p99: float
    p999: float
    same_top_percent: float
    perplexity_percent: Estimate


def summary(scores: Scores) -> Summary:
    """The figures of one cache. `trimmed` is the mean without the worst 1 % of the tokens."""
    kld = np.sort(scores.kld.astype(np.float64))
    kept = kld[: max(1, int(np.ceil(len(kld) * 0.99)))]
    gain = _blocks(scores.nll.astype(np.float64) - scores.reference_nll).mean(axis=1)
    return Summary(
        tokens=len(kld),
        mean=float(kld.mean()),
        trimmed=float(kept.mean()),
        median=float(np.median(kld)),
        p99=float(np.quantile(kld, 0.99)),
        p999=float(np.quantile(kld, 0.999)),
        same_top_percent=100 * float(scores.same_top.mean()),
        perplexity_percent=_estimate(
            gain.mean(), gain[_resamples(len(gain))].mean(axis=1), lambda x: 100 * np.expm1(x)
        ),
    )


def mean_ratio(scores: Scores, other: Scores) -> Estimate:
    """Mean KLD of `scores` over that of `other`, paired: the same tokens of the same contexts."""
    a, b = _paired_blocks(scores, other)
    picks = _resamples(len(a))
    a, b = a.mean(axis=1), b.mean(axis=1)
    return _estimate(a.mean() / b.mean(), a[picks].mean(axis=1) / b[picks].mean(axis=1))


def median_ratio(scores: Scores, other: Scores) -> Estimate:
    """As `mean_ratio`, of the medians."""
    a, b = _paired_blocks(scores, other)
    # One resample at a time: all of them together would be 2,000 copies of the data.
    drawn = [np.median(a[pick]) / np.median(b[pick]) for pick in _resamples(len(a))]
    return _estimate(np.median(a) / np.median(b), np.asarray(drawn))


def _blocks(values: np.ndarray) -> np.ndarray:
    """[blocks, BLOCK]; an incomplete last block is left out."""
    if len(values) < BLOCK:
        raise ValueError(f"{len(values)} scored tokens; at least one block of {BLOCK} is needed")
    return values[: len(values) // BLOCK * BLOCK].reshape(-1, BLOCK)


def _paired_blocks(scores: Scores, other: Scores) -> tuple[np.ndarray, np.ndarray]:
    if len(scores.kld) != len(other.kld):
        raise ValueError(f"not paired: {len(scores.kld)} tokens against {len(other.kld)}")
    return _blocks(scores.kld.astype(np.float64)), _blocks(other.kld.astype(np.float64))


def _resamples(blocks: int) -> np.ndarray:
    return np.random.default_rng(SEED).integers(0, blocks, size=(RESAMPLES, blocks))


def _estimate(value: float, drawn: np.ndarray, unit=lambda x: x) -> Estimate:
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Estimate(float(unit(value)), float(unit(low)), float(unit(high)))
