# SPDX-License-Identifier: Apache-2.0
"""How large a layer's queries are, channel by channel: the `energy` that kvarn.feedback takes.

It is a property of the model alone. The model runs once, on fixed tokens at positions 0, 1, .., without a text and
without a cache. Attention gives zeros where a layer is packed; layers that are not, those with a window, attend: with
zeros there too Gemma 3 would lose half of the gain (docs/encoder-study.md). So every engine that runs the model can do
it in the same way.
"""

from __future__ import annotations

import torch

TOKENS = 512


def tokens(vocabulary: int) -> torch.Tensor:
    """int64 [TOKENS], drawn from a vocabulary by a fixed linear congruential generator."""
    state, drawn = 1, []
    for _ in range(TOKENS):
        state = (1103515245 * state + 12345) % 2**31
        drawn.append((state >> 8) % vocabulary)
    return torch.tensor(drawn)


def of_queries(query: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """Mean squares of the queries [tokens, query_heads, head_dim], after RoPE, that read each KV head: float32
    [kv_heads, head_dim] on the CPU, powers of two, so that the last bits of a model's arithmetic do not matter."""
    squares = query.detach().double().square().mean(0).unflatten(0, (kv_heads, -1)).mean(1)
    return squares.clamp_min(2.0**-60).log2().round().exp2().float().cpu()


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
