# SPDX-License-Identifier: Apache-2.0
"""How a transformers model is made to attend through a cache.

A cache is called once per layer with a whole context:  cache(q, k, v, scale, layer) -> out
    q, out [tokens, query_heads, head_dim]    k, v [tokens, kv_heads, head_dim]    float32, on the model's device
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from kvarn.energy import window_mask

_INTERFACE = "kvarn_eval"


class Layer(NamedTuple):
    """Number `index` of `count` layers."""

    index: int
    count: int


class Past(Enum):
    """What the keys and values that a token reads were made from, before the cache rounded them.

    DECODED  hidden states that had read rounded keys and values themselves, as when every token was generated: errors
             accumulate over tokens and layers (pseudo-decode)
    PROMPT   hidden states of the model without a cache, as when all before the token was a prompt that attended to
             itself in full precision: only what this one token reads is rounded
    """

    DECODED = "decoded"
    PROMPT = "prompt"


Cache = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float, Layer], torch.Tensor]


def exact(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention as it is, causal, or with `mask` (bool [tokens, tokens], True where a query may look)."""
    # Heads repeated by hand: on GPUs grouped heads have no float32 kernel but the one that holds all scores at once.
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out = scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale)
    return out.squeeze(0).transpose(0, 1)


@contextmanager
def attending(model, cache: Cache) -> Iterator[None]:
    """Runs `model` with `cache` inside the with-block, without a key-value cache of its own, on a batch of one context,
    or of the same one twice: then row 0 is the model without a cache, and row 1 reads row 0's keys and values (PROMPT).

    Layers with a sliding window attend exactly: they keep 16 bits in every engine that quantizes only the others.
    """
    from transformers import AttentionInterface

    count = model.config.get_text_config().num_hidden_layers

    def attention(module, query, key, value, mask, scaling=None, dropout=0.0, sliding_window=None, softcap=None, **_):
        if query.shape[0] > 2 or query.shape[2] != key.shape[2]:
            raise ValueError("one whole context at a time: batch 1 or 2, as many queries as keys")
        if softcap is not None:
            raise NotImplementedError("models with soft-capped scores are not part of kvarn eval; choose another model")
        q, k, v = (x.transpose(1, 2).float() for x in (query, key, value))
        scale = scaling if scaling is not None else q.shape[-1] ** -0.5
        if sliding_window is not None:
            window = window_mask(q.shape[1], sliding_window, q.device)
            out = [exact(row, k[0], v[0], scale, window) for row in q]
        else:
            out = [exact(row, k[0], v[0], scale) for row in q[:-1]]
            out.append(cache(q[-1], k[0], v[0], scale, Layer(module.layer_idx, count)))
        return torch.stack(out).to(query.dtype), None

    AttentionInterface.register(_INTERFACE, attention)
    before = model.config._attn_implementation
    model.set_attn_implementation(_INTERFACE)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
