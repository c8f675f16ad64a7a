# SPDX-License-Identifier: Apache-2.0
"""Tiles that the appends of a step left, packed for all its layers at once."""

from __future__ import annotations

import torch

from kvarn import _launch
from kvarn.cuda.planning import Plan
from kvarn.cuda.workspace import core_of
from kvarn.layout import Layout


class Layers:
    """All layers of a plan, for pack.

    pages     uint8 [num_pages, page_bytes] each, those that their appends have
    feedback  float32 [kv_heads, head_dim, head_dim] or None each, likewise; None: no layer has any
    Raises TypeError and ValueError as append does.
    """

    __slots__ = ("core", "device", "feedback", "layout", "pages")

    def __init__(self, layout: Layout, pages, feedback=None):
        self.layout, self.pages = layout, list(pages)
        self.feedback = [None] * len(self.pages) if feedback is None else list(feedback)
        self.device = self.pages[0].device if self.pages else None
        if not torch.compiler.is_compiling():  # there the operator reads the tensors
            self.core = _launch.layers(core_of(layout), self.pages, self.feedback, self.device)


def pack(made: Plan, layers: Layers, encoder: str = "weighted") -> None:
    """Packs what the appends of a step left whose plan defers, of all its layers at once: after the last attend."""
    if not made.defer:
        raise ValueError("this plan does not defer: its appends have packed every tile; plan with defer=True")
    if made.layout != layers.layout:
        raise ValueError(f"the plan was made for {made.layout}, the layers are of {layers.layout}")
    space = made.workspace
    if layers.device not in (None, space.tensor.device):
        raise ValueError(f"the layers are on {layers.device}; the plan is on {space.tensor.device}")
    if torch.compiler.is_compiling():
        shape = made.tokens, made.max_query_len
        torch.ops.kvarn.pack(layers.pages, *made.operands(), *shape, encoder, layers.feedback)
    else:
        _launch.pack(core_of(made.layout), space.tensor, space.limits, made.step(), layers.core, encoder)
