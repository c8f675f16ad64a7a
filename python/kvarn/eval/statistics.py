# SPDX-License-Identifier: Apache-2.0
"""From the scores of tokens to the figures of a row. Intervals are 95 %, by bootstrap over contexts, and in each over
blocks of 128 tokens.

Neighbouring tokens share their history and so their error; blocks of the tile's size keep that dependence together.
Contexts differ more than blocks of one do; an interval from a single context cannot know by how much.
"""

from dataclasses import dataclass

import numpy as np

from kvarn.eval.measure import Scores

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
    """Figures of one cache: KLD in nats per token (`trimmed`: the mean without the worst 1 %), the rest in percent.

    perplexity is that of the text; perplexity_percent its change against the reference.
    """

    tokens: int
    mean: Estimate
    trimmed: float
    median: Estimate
    p99: float
    p999: float
    same_top_percent: Estimate
    perplexity: float
    perplexity_percent: Estimate


def summary(scores: Scores) -> Summary:
    """The figures of one cache."""
    kld = np.sort(scores.kld.astype(np.float64), axis=None)
    blocks = _blocks(scores.kld)
    picks = _resamples(scores)
    kept = kld[: max(1, int(np.ceil(len(kld) * 0.99)))]
    same = _blocks(scores.same_top).mean(axis=1)
    gain = _blocks(scores.nll.astype(np.float64) - scores.reference_nll).mean(axis=1)
    return Summary(
        tokens=len(kld),
        mean=_estimate(kld.mean(), blocks.mean(axis=1)[picks].mean(axis=1)),
        trimmed=float(kept.mean()),
        median=_estimate(np.median(kld), _medians(blocks, picks)),
        p99=float(np.quantile(kld, 0.99)),
        p999=float(np.quantile(kld, 0.999)),
        same_top_percent=_estimate(scores.same_top.mean(), same[picks].mean(axis=1), lambda x: 100 * x),
        perplexity=float(np.exp(scores.nll.astype(np.float64).mean())),
        perplexity_percent=_estimate(gain.mean(), gain[picks].mean(axis=1), lambda x: 100 * np.expm1(x)),
    )


def mean_ratio(scores: Scores, other: Scores) -> Estimate:
    """Mean KLD of `scores` over that of `other`, paired: the same tokens of the same contexts."""
    a, b = _paired_blocks(scores, other)
    picks = _resamples(scores)
    a, b = a.mean(axis=1), b.mean(axis=1)
    return _estimate(a.mean() / b.mean(), a[picks].mean(axis=1) / b[picks].mean(axis=1))


def median_ratio(scores: Scores, other: Scores) -> Estimate:
    """As `mean_ratio`, of the medians."""
    a, b = _paired_blocks(scores, other)
    picks = _resamples(scores)
    return _estimate(np.median(a) / np.median(b), _medians(a, picks) / _medians(b, picks))


def percent(values: np.ndarray) -> Estimate:
    """100 times the mean of one value for each question; questions are drawn. All alike, the interval has no width."""
    values = values.astype(np.float64)
    picks = np.random.default_rng(SEED).integers(0, len(values), size=(RESAMPLES, len(values)))
    return _estimate(values.mean(), values[picks].mean(axis=1), lambda x: 100 * x)


def _medians(blocks: np.ndarray, picks: np.ndarray) -> np.ndarray:
    # One resample at a time: all of them together would be 2,000 copies of the data.
    return np.asarray([np.median(blocks[pick]) for pick in picks])


def _blocks(values: np.ndarray) -> np.ndarray:
    """float64 [all blocks, BLOCK], context by context; an incomplete last block of each is left out."""
    tokens = values.shape[1]
    if tokens < BLOCK:
        raise ValueError(f"{tokens} scored tokens in a context; at least one block of {BLOCK} is needed")
    return values[:, : tokens // BLOCK * BLOCK].astype(np.float64).reshape(-1, BLOCK)


def _paired_blocks(scores: Scores, other: Scores) -> tuple[np.ndarray, np.ndarray]:
    if scores.kld.shape != other.kld.shape:
        raise ValueError(f"not paired: {scores.kld.shape} tokens against {other.kld.shape}")
    return _blocks(scores.kld), _blocks(other.kld)


def _resamples(scores: Scores) -> np.ndarray:
    """[RESAMPLES, all blocks]: numbers of the blocks drawn, contexts first and then blocks of each, with repetition."""
    contexts, blocks = scores.kld.shape[0], scores.kld.shape[1] // BLOCK
    draw = np.random.default_rng(SEED)
    texts = draw.integers(0, contexts, size=(RESAMPLES, contexts, 1))
    return (texts * blocks + draw.integers(0, blocks, size=(RESAMPLES, contexts, blocks))).reshape(RESAMPLES, -1)


def _estimate(value: float, drawn: np.ndarray, unit=lambda x: x) -> Estimate:
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Estimate(float(unit(value)), float(unit(low)), float(unit(high)))
