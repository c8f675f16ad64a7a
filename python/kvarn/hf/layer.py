# SPDX-License-Identifier: Apache-2.0
"""A full-attention layer's part of the cache: its pages, and the two calls that transformers makes.

transformers first hands the step's keys and values to `update`, then what `update` returned to the attention function.
Only the latter knows the mask. So `update` returns them as they came, marked with the layer (Pending), and kvarn's
attention function (attention.py) calls `attend`, which appends them to the pages and attends to those.
"""

from __future__ import annotations

import warnings

import torch
from transformers.cache_utils import CacheLayerMixin

import kvarn
from kvarn.energy import Feedback, Seen

from .rows import Rows, Step


class Pending(torch.Tensor):
    """The keys or values of a step on their way from the cache to the attention function: shape, dtype and device can
    be asked for, anything else is an error, since what they hold is not the whole past."""

    layer: Layer
    step_states: tuple[torch.Tensor, torch.Tensor]

    _ASKED = frozenset(
        [torch.Tensor.size, torch.Tensor.dim]
        + [getattr(torch.Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad")]
    )

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in cls._ASKED:
            return super().__torch_function__(func, types, args, kwargs)
        raise RuntimeError(
            f"{getattr(func, '__name__', func)} was called on the keys or values of a kvarn cache: this model does not "
            "attend with kvarn. Call model.set_attn_implementation('kvarn') (a kvarn.hf.Cache does so for the config "
            "that it is made with: make it with model.config). If that is set, this model is under torch.compile, or "
            "changes keys and values between cache and attention: neither can be served"
        )

    def __repr__(self, **_) -> str:
        return f"Pending({self.layer!r}, shape={tuple(self.shape)})"


class Layer(CacheLayerMixin):
    """Packed keys and values of one layer.

    pages   uint8 [capacity, page_bytes], None before the first step
    layout  kvarn.Layout, None before the first step
    feedback  kvarn.energy.Feedback, or None, and before the first step
    """

    is_sliding = False
    is_croppable = True  # what a step appended, if it is at most raw_tokens_per_page tokens
    supports_early_init = False

    def __init__(self, preset: str, encoder: str, rows: Rows, seen: Seen | None = None):
        super().__init__()
        self.preset, self.encoder, self.rows, self._seen = preset, encoder, rows, seen
        self.feedback: Feedback | None = None
        self.layout: kvarn.Layout | None = None
        self.pages: torch.Tensor | None = None
        self.columns = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """key_states, value_states [batch, kv_heads, columns, head_dim]."""
        if key_states.shape != value_states.shape:
            raise NotImplementedError(
                f"keys have shape {tuple(key_states.shape)}, values {tuple(value_states.shape)}: kvarn needs them alike"
            )
        self.layout = kvarn.Layout(self.preset, head_dim=key_states.shape[3], kv_heads=key_states.shape[1])
        self.pages = torch.empty((0, self.layout.page_bytes), dtype=torch.uint8, device=key_states.device)
        if self._seen is not None:
            self.feedback = self._seen.feedback(self.layout.k_bits).to(key_states.device)
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_, **__) -> tuple[Pending, Pending]:
        """Marks the step's keys and values for kvarn's attention function; nothing is stored yet."""
        if torch.compiler.is_compiling():
            raise NotImplementedError("a kvarn cache grows on the host: run the model without torch.compile")
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.device != (here := self.pages.device):
            raise ValueError(
                f"keys are on {key_states.device}, this layer's pages on {here}: move them, cache.to(device)"
            )
        pending = key_states.as_subclass(Pending), value_states.as_subclass(Pending)
        for marked in pending:
            marked.layer, marked.step_states = self, (key_states, value_states)
        return pending

    def attend(self, query, states, padding, *, scale: float, soft_cap: float = 0.0, sinks=None) -> torch.Tensor:
        """Appends the step and attends to the pages.

        query    [batch, query_heads, columns, head_dim];  states: keys and values of the step as `update` got them
        padding  bool [batch, columns of the cache and the step], True where there is a token; None: everywhere
        Returns [batch, columns, query_heads, head_dim], zero where there is padding.
        """
        step = self._step(query, padding)
        self._grow(step)
        q, k, v = map(step.tokens_of, (query, *states))
        out = self._attend(step, q, k, v, scale, soft_cap, sinks) if step.tokens else q
        self.columns = step.end
        return step.columns_of(out)

    def _attend(self, step: Step, q, k, v, scale: float, soft_cap: float, sinks) -> torch.Tensor:
        """q, k, v [tokens, heads, head_dim]: all of append before all of attend."""
        batch = self.layout, self.pages, *step.tables(q.device)
        plan = step.plan(q.device, self.layout, q.shape[1])
        matrix, balance = self.feedback or (None, None)
        options = {"encoder": self.encoder, "feedback": matrix, "balance": balance, "plan": plan}
        if replaced := kvarn.append(*batch, k, v, **options):  # None on CUDA: asking would wait
            warnings.warn(
                f"{replaced} keys or values were not finite, or beyond 65504, and were replaced", stacklevel=2
            )
        return kvarn.attend(*batch, q, scale=scale, soft_cap=soft_cap, sinks=sinks, balance=balance, plan=plan)

    def _step(self, query: torch.Tensor, padding: torch.Tensor | None) -> Step:
        """The step in progress, or a new one if this layer is the first in it."""
        columns = query.shape[2]
        shape = self.layout.head_dim, self.layout.kv_heads
        if self.rows.shape not in (None, shape):
            raise NotImplementedError(
                f"this layer has head_dim and KV heads {shape}, others {self.rows.shape}: kvarn serves models whose "
                "full-attention layers are alike"
            )
        if self.columns == self.rows.columns:
            return self.rows.begin(self.layout, query.shape[0], columns, padding)
        step = self.rows.step
        if step is None or self.columns + columns != step.end:
            raise RuntimeError(
                f"this layer holds {self.columns} columns, others {self.rows.columns}: an earlier forward pass did not "
                "finish; reset() the cache and start again"
            )
        return step

    def _grow(self, step: Step) -> None:
        if step.capacity > self.pages.shape[0]:
            grown = torch.empty((step.capacity, self.pages.shape[1]), dtype=torch.uint8, device=self.pages.device)
            grown[: self.pages.shape[0]] = self.pages
            self.pages = grown
        if len(step.copies):
            source, target = torch.from_numpy(step.copies).to(self.pages.device).T
            self.pages[target] = self.pages[source]

    def to(self, device: torch.device) -> None:
        if self.pages is not None:
            self.pages = self.pages.to(device)
            self.feedback = self.feedback and self.feedback.to(device)

    def get_mask_sizes(self, query_length: int | torch.Tensor) -> tuple[int, int]:
        if isinstance(query_length, torch.Tensor):  # transformers 4 gives the positions of the queries
            query_length = query_length.shape[0]
        return self.columns + query_length, 0

    def get_seq_length(self) -> int:
        return self.columns

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name in transformers 4

    def reset(self) -> None:
        self.pages, self.layout, self.is_initialized, self.columns = None, None, False, 0

    def __repr__(self) -> str:
        return f"Layer({self.preset!r}, columns={self.columns})"
