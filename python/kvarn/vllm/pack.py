# SPDX-License-Identifier: Apache-2.0
"""Tiles that a step completes, packed for all layers at once behind the last one.

Packing a tile takes longer than any layer's attention at small batches, and some request completes one in most steps.
No row of that step reads them packed (kvarn.plan finds those that are), so they wait for the end of the step, inside
its CUDA graph: what vLLM does after a step, sharing a block or copying it, finds packed pages.
"""

from kvarn import cuda

from .limits import DRAFT_WITHOUT_LAYERS
from .refuse import pack_of


class Pack:
    """Of the layers (gpu.Impl) of one group, which run in any order, each once a step."""

    def __init__(self, layers: list):
        self._layers, self._ran = layers, 0
        self._made: cuda.Layers | None = None

    @classmethod
    def of(cls, layers: list, config) -> "Pack | None":
        """None where every layer packs for itself."""
        drafts = config.speculative_config
        # Else not all layers of a group run once in every pass: those that draft run more often, by themselves.
        whole = drafts is None or drafts.method in DRAFT_WITHOUT_LAYERS
        return cls(layers) if pack_of(config) == "step" and whole and len(layers) > 1 else None

    def check(self) -> None:
        """Before a step: raises RuntimeError if the one before ended early, since tiles are missing then."""
        if self._ran:
            ran = f"{self._ran} of {len(self._layers)} layers"
            raise RuntimeError(f"kvarn: {ran} ran in a step; set kvarn_pack to layer for this model")

    def ran(self, step: cuda.Plan) -> None:
        """After a layer's attention."""
        self._ran += 1
        if self._ran < len(self._layers):
            return
        self._ran = 0
        cuda.pack(step, self._all(step.layout), self._layers[0].encoder)

    def _all(self, layout) -> cuda.Layers:
        pages = [layer.pages for layer in self._layers]
        if self._made is None or any(old is not new for old, new in zip(self._made.pages, pages, strict=True)):
            feedback = [layer.feedback and layer.feedback.matrix for layer in self._layers]
            self._made = cuda.Layers(layout, pages, feedback)
        return self._made
