# SPDX-License-Identifier: Apache-2.0
"""The caches that are compared, each as the attention function of a transformers model.

A cache is called once per layer with a whole context:  cache(q, k, v, scale) -> out
    q, out [tokens, query_heads, head_dim]    k, v [tokens, kv_heads, head_dim]    float32
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

import kvarn

Cache = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]

_INTERFACE = "kvarn_quality"


@dataclass(frozen=True)
class Kept:
    """Keys and values rounded one by one to `dtype`; float32 is the reference.

    scaled  each of K and V of a layer is first brought to the dtype's range by one factor, as calibration would do
    """

    dtype: torch.dtype = torch.float32
    scaled: bool = False

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        heads_first = (x.transpose(0, 1).unsqueeze(0) for x in (q, self._round(k), self._round(v)))
        out = scaled_dot_product_attention(*heads_first, is_causal=True, scale=scale, enable_gqa=True)
        return out.squeeze(0).transpose(0, 1)

    def _round(self, x: torch.Tensor) -> torch.Tensor:
        largest = torch.finfo(self.dtype).max
        factor = largest / x.abs().max() if self.scaled else 1.0
        return (x * factor).clamp(-largest, largest).to(self.dtype).to(x.dtype) / factor


@dataclass(frozen=True)
class Packed:
    """kvarn pages: the whole context is appended in one step and attended in the same step."""

    preset: str
    encoder: str

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        tokens, kv_heads, head_dim = k.shape
        layout = kvarn.Layout(self.preset, head_dim=head_dim, kv_heads=kv_heads)
        count = -(-tokens // layout.page_tokens) + layout.pages_ahead
        # All ones are NaN in every scale: a read of bytes that nobody wrote would show.
        pages = torch.full((count, layout.page_bytes), 0xFF, dtype=torch.uint8)
        table = torch.arange(count, dtype=torch.int32).flip(0).reshape(1, count).contiguous()
        lengths = torch.tensor([tokens], dtype=torch.int32)
        starts = torch.tensor([0, tokens], dtype=torch.int32)
        replaced = kvarn.append(layout, pages, table, lengths, starts, k, v, encoder=self.encoder)
        if replaced:
            raise ValueError(f"{self.preset}: {replaced} elements of K or V are not finite or above 65,504")
        out = torch.empty(q.shape, dtype=q.dtype)
        return kvarn.attend(layout, pages, table, lengths, starts, q, scale=scale, out=out)


@contextmanager
def attending(model, cache: Cache) -> Iterator[None]:
    """Runs `model` (one context at a time, no key-value cache of its own) with `cache` inside the with-block."""
    from transformers import AttentionInterface

    def attention(module, query, key, value, mask, scaling=None, dropout=0.0, sliding_window=None, softcap=None, **_):
        if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
            raise ValueError("one whole context at a time: batch 1, as many queries as keys")
        if sliding_window is not None or softcap is not None:
            raise NotImplementedError("sliding windows and soft-capped scores are not part of the quality run")
        q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
        return cache(q, k, v, scaling if scaling is not None else q.shape[-1] ** -0.5).unsqueeze(0), None

    AttentionInterface.register(_INTERFACE, attention)
    before = model.config._attn_implementation
    model.set_attn_implementation(_INTERFACE)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
