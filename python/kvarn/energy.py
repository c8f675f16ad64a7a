# SPDX-License-Identifier: Apache-2.0
"""How large a layer's queries are, channel by channel: the `energy` that kvarn.feedback takes.

It is a property of the model alone. The model runs once, on fixed tokens at positions 0, 1, .., with attention that
gives zeros: no text, no cache, no masks, so that every engine that runs the model can do it in the same way.
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
