# SPDX-License-Identifier: Apache-2.0
"""kvarn.hf.Cache: what transformers' DynamicCache would be, its full-attention layers held in kvarn pages."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import PretrainedConfig
from transformers import cache_utils as tf

from kvarn.energy import Seen
from kvarn.layer_numbers import by_number

from . import attention
from .layer import Layer
from .refuse import refuse
from .rows import Rows


class Cache(tf.Cache):
    """A cache for `generate` and for forward passes: model.generate(.., past_key_values=Cache(model.config)).

    config   of the model. Making a cache sets its attention implementation to "kvarn", which for other caches does what
             the model would do without
    preset   "kvarn_k4v2_g128" and so on, see docs/specification.md
    encoder  "weighted", or "varnorm" (the published one)
    layers   other presets for some layers, by their number: {0: "kvarn_k8v4_g128", "4-6": ..}, as `kvarn eval layers`
             finds them; tiles must have as many tokens
    feedback of kvarn.hf.feedback(model): keys are rounded for that model's queries, which loses less; None: for any
    Raises ValueError or NotImplementedError, with the reason, for models that it cannot serve.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        preset: str = "kvarn_k4v2_g128",
        encoder: str = "weighted",
        layers: Mapping[int | str, str] | None = None,
        feedback: Mapping[int, Seen] | None = None,
    ):
        layers, feedback = by_number(layers or {}), feedback or {}
        refuse(config, preset, encoder, layers)
        if feedback and encoder != "weighted":
            raise ValueError(f"feedback is for the weighted encoder, not {encoder}")
        decoder = config.get_text_config(decoder=True)
        self.preset, self.rows = preset, Rows((preset, *layers.values()))
        # transformers knows which layers a model has; sliding windows and linear attention stay as they are.
        made = [
            Layer(layers.get(number, preset), encoder, self.rows, feedback.get(number))
            if type(layer) is tf.DynamicLayer
            else layer
            for number, layer in enumerate(tf.DynamicCache(config=decoder).layers)
        ]
        super().__init__(layers=made)
        decoder._attn_implementation = attention.NAME

    @property
    def packed_layers(self) -> list[Layer]:
        return [layer for layer in self.layers if isinstance(layer, Layer)]

    @property
    def other_layers(self) -> list:
        return [layer for layer in self.layers if not isinstance(layer, Layer)]

    @property
    def batch_size(self) -> int:
        return -1 if self.rows.sequences is None else len(self.rows.sequences.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes that the cache holds, pages not used yet included."""
        tensors = [layer.pages for layer in self.packed_layers]
        tensors += [x for layer in self.other_layers for x in (layer.keys, layer.values)]
        return sum(x.nbytes for x in tensors if x is not None)

    def to(self, device: torch.device | str) -> Cache:
        """Moves the whole cache, so that a conversation at rest costs no GPU memory. Returns the cache."""
        for layer in self.layers:
            if isinstance(layer, Layer):
                layer.to(device)
            elif layer.is_initialized:
                layer.keys, layer.values = layer.keys.to(device), layer.values.to(device)
                layer.device = layer.keys.device
        return self

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the last -tokens_to_remove columns of every row off, such that no trace remains; a positive number is a
        length to crop to. Goes back raw_tokens_per_page tokens of the last step (27 at k4v2), to the start of the
        unfinished tile, and to any multiple of page_tokens.

        Raises ValueError, and changes nothing, where the 16-bit tokens that this needs are packed already.
        """
        tokens_to_remove = int(tokens_to_remove)  # assisted generation hands over a tensor
        columns = max(0, self.rows.columns - tokens_to_remove) if tokens_to_remove > 0 else -tokens_to_remove
        self.rows.check_crop(columns)
        for layer in self.other_layers:
            layer.crop(tokens_to_remove)  # also 0, which makes a sliding window forget what it kept to go back to
        self.rows.crop(columns)
        for layer in self.packed_layers:
            layer.columns = self.rows.columns

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row i goes on from row beam_idx[i]. Rows that go on from the same one share its packed pages."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        for layer in self.other_layers:
            layer.batch_select_indices(indices)
        self.rows.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if (rows := self.batch_size) > 0:
            self.batch_select_indices(torch.arange(rows).repeat_interleave(repeats))

    def reset(self) -> None:
        super().reset()
        self.rows.reset()

    def __repr__(self) -> str:
        return f"Cache({self.preset!r}, layers={len(self.layers)}, columns={self.rows.columns}, nbytes={self.nbytes})"
