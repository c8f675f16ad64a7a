# SPDX-License-Identifier: Apache-2.0
"""What a kvarn.hf.Cache cannot serve, said when it is made."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PretrainedConfig
from transformers import cache_utils as tf

import kvarn

LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention")


def refuse(config: PretrainedConfig, preset: str, encoder: str, layers: Mapping[int, str]) -> None:
    """Raises TypeError, ValueError or NotImplementedError with what was given, what is allowed and what to do."""
    if not isinstance(config, PretrainedConfig):
        raise TypeError(f"config is {type(config).__name__}; it must be a model's config: Cache(model.config)")
    if encoder not in kvarn.ENCODERS:
        raise ValueError(f"encoder is {encoder!r}; it must be one of {', '.join(kvarn.ENCODERS)}")
    decoder = config.get_text_config(decoder=True)
    name = decoder.model_type
    if config.is_encoder_decoder or decoder.is_encoder_decoder:
        raise NotImplementedError(f"{name} is an encoder-decoder; kvarn serves decoder-only models")
    if getattr(decoder, "kv_lora_rank", None):
        raise NotImplementedError(f"{name} has multi-head latent attention (MLA), whose cache kvarn does not serve")
    if getattr(decoder, "num_kv_shared_layers", None):
        raise NotImplementedError(f"{name} has layers that share keys and values; kvarn does not serve them")
    kinds = [type(layer) for layer in tf.DynamicCache(config=decoder).layers]
    names = {kind.__name__ for kind in kinds} - {"DynamicLayer", "DynamicSlidingWindowLayer"}
    names |= set(getattr(decoder, "layer_types", None) or []) - set(LAYER_TYPES)
    if names:
        raise NotImplementedError(
            f"{name} has layers of kind {', '.join(sorted(names))}; kvarn serves full attention, and leaves layers "
            "with a sliding window to transformers"
        )
    if tf.DynamicLayer not in kinds:
        raise NotImplementedError(f"every layer of {name} has a sliding window: there is nothing to pack")
    layout = kvarn.Layout(preset, _head_dim(decoder), kv_heads=1)
    full = [number for number, kind in enumerate(kinds) if kind is tf.DynamicLayer]
    for number, other in layers.items():
        if number not in full:
            raise ValueError(f"layers names layer {number!r}; the full-attention layers of {name} are {full}")
        if (tokens := kvarn.Layout(other, layout.head_dim, kv_heads=1).page_tokens) != layout.page_tokens:
            raise ValueError(
                f"layers gives layer {number} {other}, in tiles of {tokens} tokens; those of {preset} have "
                f"{layout.page_tokens}"
            )


def _head_dim(decoder: PretrainedConfig) -> int:
    """Of full-attention layers; those of Gemma 4 have a head_dim of their own."""
    for field in ("global_head_dim", "head_dim"):
        if getattr(decoder, field, None):
            return getattr(decoder, field)
    return decoder.hidden_size // decoder.num_attention_heads
