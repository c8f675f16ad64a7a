# SPDX-License-Identifier: Apache-2.0
"""The caches that are compared. Each is a frozen dataclass: its repr names it in the store of finished contexts."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

import kvarn
from kvarn.energy import Seen
from kvarn.eval.attention import Layer, exact
from kvarn.rivals import Recent, Rival

# Query rows that are attended together; also the tile whose tokens Recent.TILE keeps.
TILE = 128
KIVI_VALUES = 128


@dataclass(frozen=True)
class Plain:
    """Keys and values rounded one by one to `dtype`; float32 is the reference."""

    dtype: torch.dtype = torch.float32

    def __call__(self, q, k, v, scale: float, layer: Layer) -> torch.Tensor:
        return exact(q, k.to(self.dtype).to(k.dtype), v.to(self.dtype).to(v.dtype), scale)


@dataclass(frozen=True)
class Packed:
    """kvarn pages: the whole context is appended in one step and attended in the same step.

    feedback  of kvarn.hf.feedback, or None
    """

    preset: str
    encoder: str
    feedback: Mapping[int, Seen] | None = None

    @cached_property
    def _feedback_digest(self) -> str | None:
        tensors = [x for its in (self.feedback or {}).values() for x in (its.queries, its.keys)]
        made = b"".join(x.numpy().tobytes() for x in tensors)
        return hashlib.sha256(made).hexdigest() if made else None

    def __repr__(self) -> str:
        return f"Packed({self.preset!r}, {self.encoder!r}, {self._feedback_digest!r})"

    def __call__(self, q, k, v, scale: float, layer: Layer) -> torch.Tensor:
        tokens, kv_heads, head_dim = k.shape
        layout = kvarn.Layout(self.preset, head_dim=head_dim, kv_heads=kv_heads)
        count = -(-tokens // layout.page_tokens) + layout.pages_ahead
        # All ones are NaN in every scale: a read of bytes that nobody wrote would show.
        pages = torch.full((count, layout.page_bytes), 0xFF, dtype=torch.uint8, device=k.device)
        table = torch.arange(count, dtype=torch.int32, device=k.device).flip(0).reshape(1, count).contiguous()
        lengths = torch.tensor([tokens], dtype=torch.int32, device=k.device)
        starts = torch.tensor([0, tokens], dtype=torch.int32, device=k.device)
        counted = torch.zeros(1, dtype=torch.int64, device=k.device) if k.is_cuda else None
        step = layout, pages, table, lengths, starts
        matrix, balance = None, None
        if self.feedback:
            matrix, balance = self.feedback[layer.index].feedback(layout.k_bits).to(k.device)
        options = {"encoder": self.encoder, "feedback": matrix, "balance": balance}
        replaced = kvarn.append(*step, k, v, **options, replaced=counted)
        if replaced := counted.item() if k.is_cuda else replaced:
            raise ValueError(f"{self.preset}: {replaced} elements of K or V are not finite or above 65,504")
        return kvarn.attend(*step, q, scale=scale, balance=balance)


@dataclass(frozen=True)
class Layered:
    """Layers in caches of their own, by number; the others in `others`."""

    own: Mapping[int, Packed]
    others: Packed | Plain

    def __call__(self, q, k, v, scale: float, layer: Layer) -> torch.Tensor:
        return self.own.get(layer.index, self.others)(q, k, v, scale, layer)


@dataclass(frozen=True)
class Simulated:
    """A rival: every query reads packed what a decode step at its position would read packed, and `recent` raw."""

    rival: Rival
    recent: Recent

    def __call__(self, q, k, v, scale: float, layer: Layer) -> torch.Tensor:
        if not self.rival.packs(*layer):
            return exact(q, k, v, scale)
        packed_k, packed_v = self.rival.keys(k), self.rival.values(v)
        if self.recent is Recent.NONE:
            return exact(q, packed_k, packed_v, scale)
        return torch.cat([self._tile(q, k, v, packed_k, packed_v, scale, first) for first in range(0, len(q), TILE)])

    def _tile(self, q, k, v, packed_k, packed_v, scale: float, first: int) -> torch.Tensor:
        """The rows of one tile, which share their raw keys but under Recent.KIVI not their raw values."""
        end = min(first + TILE, len(q))
        keys = torch.cat([packed_k[:first], k[first:end]]).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        columns = torch.arange(end, device=q.device)
        rows = columns[first:, None]
        scores = torch.einsum("thd,shd->hts", q[first:end], keys) * scale
        weights = scores.masked_fill(columns > rows, -torch.inf).softmax(-1)
        raw = columns >= (first if self.recent is Recent.TILE else rows - KIVI_VALUES)
        groups = weights.unflatten(0, (k.shape[1], -1))
        out = torch.einsum("hgts,shd->thgd", groups * raw, v[:end])
        return (out + torch.einsum("hgts,shd->thgd", groups * ~raw, packed_v[:end])).flatten(1, 2)
