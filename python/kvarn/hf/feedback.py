# SPDX-License-Identifier: Apache-2.0
"""kvarn.hf.feedback(model): what lets a cache round a model's keys for that model's queries."""

from __future__ import annotations

import torch
from transformers import AttentionInterface, PreTrainedModel

from kvarn import energy

_NAME = "kvarn_energy"


def feedback(model: PreTrainedModel, balanced: bool = True) -> dict[int, energy.Seen]:
    """For Cache(.., feedback=..), by the number of a layer: one forward pass of kvarn.energy.TOKENS tokens. Make it
    once for a model; it depends on nothing but the weights.

    balanced  False: keys are not divided, and queries not multiplied, by how far keys deviate (kvarn.append, balance)
    """
    found: dict[int, energy.Seen] = {}

    def attention(
        module, query, key, value, attention_mask, scaling=None, sliding_window=None, softcap=None, s_aux=None, **_
    ):
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        found[module.layer_idx] = energy.Seen.of(q, k)
        if sliding_window is None:
            return q.new_zeros(1, *q.shape[:2], v.shape[-1]), None
        scale = q.shape[-1] ** -0.5 if scaling is None else scaling
        return energy.attention(q, k, v, scale, sliding_window, s_aux, softcap)[None], None

    AttentionInterface.register(_NAME, attention)
    decoder = model.config.get_text_config(decoder=True)
    before, training = decoder._attn_implementation, model.training
    decoder._attn_implementation = _NAME
    try:
        with torch.no_grad():
            model.eval().base_model(energy.tokens(decoder.vocab_size)[None].to(model.device), use_cache=False)
    finally:
        decoder._attn_implementation = before
        model.train(training)
    return found if balanced else {layer: its.unbalanced() for layer, its in found.items()}
