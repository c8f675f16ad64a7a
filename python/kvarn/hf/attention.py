# SPDX-License-Identifier: Apache-2.0
"""The attention implementation "kvarn" of transformers: kvarn for layers of a kvarn.hf.Cache, for all others what the
model would do without it, so that sliding-window layers, other caches and passes without a cache work as before."""

from __future__ import annotations

import sys
from functools import cached_property

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from .layer import Pending

NAME = "kvarn"


class Mask:
    """A mask that is written out only if a layer needs it so.

    padding  bool [batch, columns], True where there is a token, or None
    causal   whether it is nothing but causal, with that padding
    """

    def __init__(self, padding: torch.Tensor | None, causal: bool, arguments: dict):
        self.padding, self.causal, self._arguments = padding, causal, arguments

    @cached_property
    def boolean(self) -> torch.Tensor | None:
        """bool [batch, 1, rows, columns], or None where is_causal of scaled_dot_product_attention says the same."""
        return sdpa_mask(**self._arguments)

    def contiguous(self) -> torch.Tensor:
        """The whole mask. transformers calls this for caches that it compiles, which are never kvarn's."""
        return sdpa_mask(**self._arguments | {"allow_is_causal_skip": False}).contiguous()


def mask(mask_function=causal_mask_function, attention_mask=None, local_size=None, **arguments) -> Mask:
    """The mask function of this implementation, see transformers.AttentionMaskInterface."""
    causal = mask_function is causal_mask_function and local_size is None
    arguments |= {"mask_function": mask_function, "attention_mask": attention_mask, "local_size": local_size}
    return Mask(attention_mask, causal, arguments)


def attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """The attention function of this implementation, see transformers.AttentionInterface.

    query [batch, query_heads, columns, head_dim]; returns [batch, columns, query_heads, head_dim] and None.
    """
    if not isinstance(key, Pending):
        return _as_before(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    _refuse(module, query, attention_mask, dropout, kwargs)
    sinks = kwargs.get("s_aux")
    out = key.layer.attend(
        query,
        key.step_states,
        attention_mask.padding if isinstance(attention_mask, Mask) else None,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        soft_cap=kwargs.get("softcap") or 0.0,
        sinks=None if sinks is None else sinks.float(),
    )
    return out, None


def _as_before(module, query, key, value, attention_mask, **kwargs):
    """scaled_dot_product_attention, or where it lacks sinks and soft caps the model's own eager attention."""
    if kwargs.get("s_aux") is None and kwargs.get("softcap") is None:
        dense = attention_mask.boolean if isinstance(attention_mask, Mask) else attention_mask
        return sdpa_attention_forward(module, query, key, value, dense, **kwargs)
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        raise NotImplementedError(
            f"{type(module).__name__} has sinks or a soft cap and no eager attention to fall back on"
        )
    dense = attention_mask.contiguous() if isinstance(attention_mask, Mask) else attention_mask
    if dense is not None and dense.dtype == torch.bool:
        dense = torch.where(dense, 0.0, torch.finfo(query.dtype).min).to(query.dtype)
    return eager(module, query, key, value, dense, **kwargs)


def _refuse(module, query, attention_mask, dropout: float, kwargs: dict) -> None:
    if module.training or dropout or (torch.is_grad_enabled() and query.requires_grad):
        raise NotImplementedError("a kvarn cache is for inference: call model.eval(), and the model in torch.no_grad()")
    if attention_mask is not None and not (isinstance(attention_mask, Mask) and attention_mask.causal):
        raise NotImplementedError(
            "a kvarn cache serves causal masks with padding only (attention_mask [batch, columns]); this layer has "
            f"another one ({type(attention_mask).__name__}: a 4-D mask, packed sequences, images that see ahead, ..)"
        )
    if kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise NotImplementedError(f"{type(module).__name__} is not causal; a kvarn cache serves causal attention only")
    if kwargs.get("sliding_window") is not None:
        raise NotImplementedError(
            "a sliding-window layer with a full cache; make the cache with the model's own config"
        )
    if kwargs.get("position_bias") is not None:
        raise NotImplementedError("kvarn's attention has no position bias")
    if kwargs.get("output_attentions"):
        raise NotImplementedError("kvarn's attention never holds the attention weights: leave out output_attentions")
    if kwargs.get("s_aux") is not None and query.device.type != "cuda":
        raise NotImplementedError("attention sinks are served on CUDA only; use transformers' DynamicCache on the CPU")


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)
