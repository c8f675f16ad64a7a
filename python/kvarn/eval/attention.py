# SPDX-License-Identifier: Apache-2.0
"""How a transformers model is made to attend through a cache.

A cache is called once per layer with a whole context:  cache(q, k, v, scale, layer) -> out
    q, out [tokens, query_heads, head_dim]    k, v [tokens, kv_heads, head_dim]    float32
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

_INTERFACE = "kvarn_eval"


class Layer(NamedTuple):
    """Number `index` of `count` layers."""

    index: int
    count: int


Cache = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float, Layer], torch.Tensor]


def exact(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention as it is, causal, or with `mask` (bool [tokens, tokens], True where a query may look)."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out = scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=True)
    return out.squeeze(0).transpose(0, 1)


def window_mask(tokens: int, window: int) -> torch.Tensor:
    """bool [tokens, tokens]: each query sees itself and the `window` - 1 tokens before it."""
    behind = torch.arange(tokens)[:, None] - torch.arange(tokens)
    return (behind >= 0) & (behind < window)


@contextmanager
def attending(model, cache: Cache) -> Iterator[None]:
    """Runs `model` (one context at a time, no key-value cache of its own) with `cache` inside the with-block.

    Layers with a sliding window attend exactly: they keep 16 bits in every engine that quantizes only the others.
    """
    from transformers import AttentionInterface

    count = model.config.get_text_config().num_hidden_layers

    def attention(module, query, key, value, mask, scaling=None, dropout=0.0, sliding_window=None, softcap=None, **_):
        if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
            raise ValueError("one whole context at a time: batch 1, as many queries as keys")
        if softcap is not None:
            raise NotImplementedError("models with soft-capped scores are not part of kvarn eval; choose another model")
        q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
        scale = scaling if scaling is not None else q.shape[-1] ** -0.5
        if sliding_window is not None:
            out = exact(q, k, v, scale, window_mask(len(q), sliding_window))
        else:
            out = cache(q, k, v, scale, Layer(module.layer_idx, count))
        return out.unsqueeze(0), None

    AttentionInterface.register(_INTERFACE, attention)
    before = model.config._attn_implementation
    model.set_attn_implementation(_INTERFACE)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
