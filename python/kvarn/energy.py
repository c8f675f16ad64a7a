# SPDX-License-Identifier: Apache-2.0
"""What a cache may know of a model before it holds a token: how large a layer's queries are, channel by channel, and
how far its keys deviate. kvarn.feedback makes of the former what keys are rounded with; the latter is the balance.

Both are properties of the model alone. The model runs once, on fixed tokens at positions 0, 1, .., without a text and
without a cache. Attention gives zeros where a layer is packed; layers that are not, those with a window, attend: with
zeros there too Gemma 3 would lose half of the gain (docs/encoder-study.md). So every engine that runs the model can do
it in the same way.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from kvarn._feedback import feedback

TOKENS = 512
_TILE = 128
# Channels that hardly deviate about a large mean are left as if they deviated by a 64th of it: raw tokens are f16.
_OF_SIZE, _OF_MOST = 2.0**-12, 2.0**-20
# K of fewer bits has every channel balanced, K of more only those that deviate so much more or less than most: with
# small factors too, 4 bits lost 4 to 15 % on three of four models and won 18 % on one (docs/encoder-study.md).
_MANY_BITS, _FAR = 4, 4.0


class Feedback(NamedTuple):
    """Of a layer, for append and attend.

    matrix   float32 [kv_heads, head_dim, head_dim], of kvarn.feedback: K's codes are rounded with it
    balance  float32 [kv_heads, head_dim], or None: keys are divided and queries multiplied by it; None where all are 1
    """

    matrix: torch.Tensor
    balance: torch.Tensor | None

    def to(self, device) -> Feedback:
        return Feedback(self.matrix.to(device), None if self.balance is None else self.balance.to(device))


@dataclass(frozen=True, eq=False)
class Seen:
    """Of a layer on the fixed tokens: float32 [kv_heads, head_dim] on the CPU, powers of two, so that the last bits of
    a model's arithmetic do not matter.

    queries  mean squares of the queries that read each KV head, after RoPE
    keys     how far the keys deviate within 128 tokens, after RoPE, over the geometric mean of a head's channels
    """

    queries: torch.Tensor
    keys: torch.Tensor

    @classmethod
    def of(cls, query: torch.Tensor, key: torch.Tensor) -> Seen:
        """query [tokens, query_heads, head_dim], key [tokens, kv_heads, head_dim]."""
        return cls(of_queries(query, key.shape[1]), of_keys(key))

    def unbalanced(self) -> Seen:
        """As if all keys deviated alike."""
        return Seen(self.queries, torch.ones_like(self.keys))

    def feedback(self, k_bits: int) -> Feedback:
        """For a cache with K of so many bits; made once."""
        return self._of_many_bits if k_bits >= _MANY_BITS else self._of_few_bits

    @cached_property
    def _of_many_bits(self) -> Feedback:
        return self._balanced((self.keys >= _FAR) | (self.keys <= 1 / _FAR))

    @cached_property
    def _of_few_bits(self) -> Feedback:
        return self._balanced(self.keys != 1)

    def _balanced(self, channels: torch.Tensor) -> Feedback:
        if not channels.any():  # nothing to divide then, step after step
            return Feedback(feedback(self.queries), None)
        balance = torch.where(channels, self.keys, 1)
        return Feedback(feedback(self.queries * balance.square()), balance)


def tokens(vocabulary: int) -> torch.Tensor:
    """int64 [TOKENS], drawn from a vocabulary by a fixed linear congruential generator."""
    state, drawn = 1, []
    for _ in range(TOKENS):
        state = (1103515245 * state + 12345) % 2**31
        drawn.append((state >> 8) % vocabulary)
    return torch.tensor(drawn)


def of_queries(query: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """See Seen; query [tokens, query_heads, head_dim]."""
    squares = query.detach().double().square().mean(0).unflatten(0, (kv_heads, -1)).mean(1)
    return _power_of_two(squares.clamp_min(2.0**-60))


def of_keys(key: torch.Tensor) -> torch.Tensor:
    """See Seen; key [tokens, kv_heads, head_dim]."""
    tiles = key.detach().double().unflatten(0, (-1, _TILE))
    spread = tiles.var(1, correction=0).mean(0)
    spread = spread.maximum(tiles.square().mean((0, 1)) * _OF_SIZE)
    spread = spread.maximum(spread.amax(-1, keepdim=True) * _OF_MOST).clamp_min(2.0**-60)
    return _power_of_two((spread / spread.log().mean(-1, keepdim=True).exp()).sqrt())


def _power_of_two(x: torch.Tensor) -> torch.Tensor:
    return x.log2().round().exp2().float().cpu()


def window_mask(tokens: int, window: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """bool [tokens, tokens]: each query sees itself and the `window` - 1 tokens before it."""
    places = torch.arange(tokens, device=device)
    behind = places[:, None] - places
    return (behind >= 0) & (behind < window)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
    soft_cap: float | None = None,
) -> torch.Tensor:
    """What a layer that is not packed gives: causal attention, in float32.

    query   [tokens, query_heads, head_dim]
    key, value  [tokens, kv_heads, head_dim]; value may have another head_dim
    window  how many tokens a query sees, itself included; None: all before it
    sinks   None, or a logit for each query head that takes its share of the weights
    returns [tokens, query_heads, value's head_dim] of query's dtype
    """
    tokens, heads = query.shape[:2]
    q, k, v = (x.float().transpose(0, 1) for x in (query, key, value))
    k, v = (x.repeat_interleave(heads // len(x), 0) for x in (k, v))
    scores = q @ k.transpose(1, 2) * scale
    if soft_cap:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    seen = window_mask(tokens, window or tokens, query.device)
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.float()[:, None, None].expand(heads, tokens, 1)], -1)
    return (scores.softmax(-1)[..., :tokens] @ v).transpose(0, 1).to(query.dtype)
