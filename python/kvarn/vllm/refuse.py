# SPDX-License-Identifier: Apache-2.0
"""Refusing what kvarn cannot serve through vLLM, with the reason and what to do instead: at start-up, never ignored.

limits.py has what a configuration shows; what only a layer of the model shows is here, and kvarn's own options.
"""

import os

import kvarn
from kvarn import cuda

from . import compat

# Whose attention computes prompts on a GPU: FlashAttention's, or kvarn's own, whose bits no schedule changes.
PROMPTS = ("flash", "exact")
# When tiles are packed on a GPU: at the end of a step, those of all layers, or each in its layer.
PACK = ("step", "layer")
USE_16_BIT = "serve this model with --kv-cache-dtype auto"


class Refused(ValueError):
    """vLLM was asked for a preset in a configuration that kvarn cannot serve."""


def check_layer(preset: str, selector) -> None:
    """Raises Refused if the layer described by vLLM's AttentionSelectorConfig cannot be served."""
    decoder = str(getattr(selector.attn_type, "value", selector.attn_type)) == "decoder"
    _refuse_layer(
        preset,
        {
            "multi-head latent attention": selector.use_mla,
            "sparse attention": selector.use_sparse,
            "attention sinks": selector.has_sink and compat.platform_name() != "cuda",
            "bidirectional prefixes": selector.use_mm_prefix,
            "attention that is not a decoder's own": not decoder,
            "a sliding window": getattr(selector, "has_sliding_window", False),
            "attention without a causal mask": getattr(selector, "use_non_causal", False),
        },
    )
    kvarn.Layout(preset, head_dim=selector.head_size, kv_heads=1)


def check_impl(layout, query_heads: int, attn_type, **arguments) -> None:
    """Raises Refused if a layer's constructor got something that the kernels do not compute."""
    decoder = str(getattr(attn_type, "value", attn_type)) == "decoder"
    present = {name: not _is_default(value) for name, value in arguments.items()}
    _refuse_layer(layout.preset, present | {f"attention of type {attn_type}": not decoder})
    if lacking := no_kernels(layout, query_heads):  # a draft model's layers are in no configuration that we saw
        raise Refused(f"--kv-cache-dtype {layout.preset}: {lacking}; {USE_16_BIT}")


def no_kernels(layout, query_heads: int) -> str | None:
    """What this platform's kernels lack for a layer."""
    ratio, most = query_heads / layout.kv_heads, 64
    if compat.platform_name() == "cuda":
        most, shape = cuda.MOST_GROUP, f"{layout.preset.removeprefix('kvarn_')}_d{layout.head_dim}"
        if shape not in kvarn.cuda_shapes():
            return f"this kvarn has no CUDA kernels of {shape}, but of {', '.join(kvarn.cuda_shapes())}"
    return None if ratio <= most else f"the model has {ratio:g} query heads per KV head, and {most} is the most"


def _is_default(value) -> bool:
    return value is None or value is False or (isinstance(value, int) and value == -1)


def _refuse_layer(preset: str, features: dict[str, bool]) -> None:
    present = [name for name, is_present in features.items() if is_present]
    if present:
        raise Refused(f"--kv-cache-dtype {preset}: a layer of this model has {', '.join(present)}; {USE_16_BIT}")


def encoder_of(config) -> str:
    """The encoder chosen for this server: additional_config["kvarn_encoder"], else $KVARN_ENCODER, else weighted."""
    return _choice(config, "kvarn_encoder", kvarn.ENCODERS)


def prompts_of(config) -> str:
    """Whose attention computes prompts: additional_config["kvarn_prompts"], else $KVARN_PROMPTS, else flash."""
    return _choice(config, "kvarn_prompts", PROMPTS)


def feedback_of(config) -> str:
    """Whether keys are rounded for the model's queries: additional_config["kvarn_feedback"], else $KVARN_FEEDBACK, else
    on."""
    return _choice(config, "kvarn_feedback", ("on", "off"))


def pack_of(config) -> str:
    """When tiles are packed on a GPU: additional_config["kvarn_pack"], else $KVARN_PACK, else step."""
    return _choice(config, "kvarn_pack", PACK)


def option_of(config, option: str):
    """What a user says: additional_config[option] of a VllmConfig, else the environment variable; None: nothing."""
    additional = config.additional_config if isinstance(config.additional_config, dict) else {}
    return additional.get(option) or os.environ.get(option.upper())


def _choice(config, option: str, allowed: tuple[str, ...]) -> str:
    name = option_of(config, option) or allowed[0]
    if name not in allowed:
        raise Refused(f"unknown {option.replace('_', ' ')} {name!r}; allowed are {' and '.join(allowed)}")
    return name


def page_tokens(preset: str) -> int:
    """Tokens of a tile."""
    return kvarn.Layout(preset, head_dim=128, kv_heads=1).page_tokens
