# SPDX-License-Identifier: Apache-2.0
"""How each of our hooks is put into vLLM, whatever its release: features are asked for, not versions. 0.26 to 0.33."""

import functools
import sys

from . import contract


def capability() -> tuple[int, int] | None:
    """Compute capability of the first device, asked without touching it; None: not known."""
    from vllm.platforms import current_platform

    found = current_platform.get_device_capability()
    return None if found is None else (found.major, found.minor)


def platform_name() -> str:
    """ "cpu", "cuda", ..."""
    from vllm.platforms import current_platform

    return current_platform.device_type or "unspecified"


def install(presets: tuple[str, ...], hooks) -> None:
    """Makes this process's vLLM know `presets` and ask `hooks` (the module). Later calls change nothing."""
    from vllm.platforms import current_platform

    _add_cache_dtypes(presets)
    platform = type(current_platform)

    def check_and_update_config(inner, vllm_config, *args, **kwargs):
        inner(vllm_config, *args, **kwargs)  # first: it settles the block size
        hooks.check_config(vllm_config)

    def get_attn_backend_cls(inner, *args, **kwargs):
        selector = kwargs["attn_selector_config"] if "attn_selector_config" in kwargs else args[1]
        return hooks.backend_path(selector) or inner(*args, **kwargs)

    def register_custom_kv_cache_specs(inner, vllm_config, *args, **kwargs):
        inner(vllm_config, *args, **kwargs)
        hooks.register_specs(vllm_config)

    def update_block_size_for_backend(inner, vllm_config, *args, **kwargs):
        inner(vllm_config, *args, **kwargs)
        if vllm_config.model_config is not None:
            hooks.settle_blocks(vllm_config)

    for around in (
        check_and_update_config, get_attn_backend_cls, register_custom_kv_cache_specs, update_block_size_for_backend,
    ):  # fmt: skip
        wrap(platform, around.__name__, around, kind=classmethod)


def wrap_layer_spec(layer_spec) -> None:
    """Every Attention layer answers `layer_spec(layer, its own answer, vllm_config)` when asked for its cache spec."""
    from vllm.model_executor.layers.attention.attention import Attention

    def get_kv_cache_spec(inner, layer, vllm_config, *args, **kwargs):
        return layer_spec(layer, inner(layer, vllm_config, *args, **kwargs), vllm_config)

    wrap(Attention, "get_kv_cache_spec", get_kv_cache_spec)


def after_loading(weights_loaded) -> None:
    """`weights_loaded(model, model_config)` whenever a model's weights are loaded, in the form that kernels want."""
    from vllm.model_executor.model_loader import base_loader

    def process_weights_after_loading(inner, model, model_config, *args, **kwargs):
        inner(model, model_config, *args, **kwargs)
        weights_loaded(model, model_config)

    wrap(base_loader, "process_weights_after_loading", process_weights_after_loading)


def mix_windows(preset_of) -> None:
    """Packed layers count as layers without a window for FlashAttention, as they would in 16 bits.

    Its builder makes schedules ahead where all its layers have one window, and vLLM 0.26 to 0.33 then hands the first
    group's to every group of equal layers, while a CUDA graph reads each group's own: wrong from the second group on.
    """
    from vllm.v1.attention.backends import flash_attn

    def _get_sliding_window_configs(inner, vllm_config):
        return inner(vllm_config) | (set() if preset_of(vllm_config) is None else {None})

    wrap(flash_attn, "_get_sliding_window_configs", _get_sliding_window_configs)


def widen_mixed_rows() -> None:
    """0.26: a group of unequal layers takes its block table width from none of them; here, from all."""
    from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs

    def max_num_blocks_per_req(self, vllm_config, max_len: int) -> int:
        return max(spec.max_num_blocks_per_req(vllm_config, max_len) for spec in self.kv_cache_specs.values())

    if "max_num_blocks_per_req" not in vars(UniformTypeKVCacheSpecs):
        UniformTypeKVCacheSpecs.max_num_blocks_per_req = max_num_blocks_per_req


def zero_windows() -> None:
    """Up to where vLLM knows caches of mixed precision (0.32): blocks are zeroed as their managers record them."""
    from vllm.v1.kv_cache_interface import KVCacheConfig

    if hasattr(KVCacheConfig, "has_mixed_precision_kv_cache"):
        return

    def needs_kv_cache_zeroing(config) -> bool:
        kinds = {type(group.kv_cache_spec).__name__ for group in config.kv_cache_groups}
        return config.has_mamba_layers or "WindowSpec" in kinds

    KVCacheConfig.needs_kv_cache_zeroing = property(needs_kv_cache_zeroing)


_most_tokens_ahead = 0


def widen_rows(tokens_ahead: int) -> None:
    """0.26 and 0.28: model runner 2 makes block table rows of the model's length, whatever the spec says."""
    global _most_tokens_ahead
    _most_tokens_ahead = max(_most_tokens_ahead, tokens_ahead)
    if platform_name() == "cpu" or contract.runner_2_asks_spec():
        return
    from vllm.v1.worker.gpu.block_table import BlockTables

    def __init__(inner, tables, *args, **kwargs):
        widths = zip(kwargs["max_num_blocks_per_group"], kwargs["block_sizes"], strict=True)
        kwargs["max_num_blocks_per_group"] = [width + -(-_most_tokens_ahead // size) for width, size in widths]
        inner(tables, *args, **kwargs)

    wrap(BlockTables, "__init__", __init__)


def wrap(owner: type, name: str, around, kind=lambda function: function) -> None:
    """Has `around(the former one, ...)` answer for `owner.name` from now on; a second call changes nothing."""
    inner = getattr(owner, name)
    if hasattr(inner, "wrapped_by_kvarn"):
        return
    if kind is classmethod:

        def wrapper(cls, *args, **kwargs):
            return around(inner, *args, **kwargs)
    else:

        def wrapper(*args, **kwargs):
            return around(inner, *args, **kwargs)

    functools.update_wrapper(wrapper, inner)
    wrapper.wrapped_by_kvarn = True
    setattr(owner, name, kind(wrapper))


def _add_cache_dtypes(presets: tuple[str, ...]) -> None:
    import torch
    from vllm.config import cache
    from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE

    new = tuple(name for name in presets if name not in STR_DTYPE_TO_TORCH_DTYPE)
    if not new:
        return
    if hasattr(cache, "register_kv_cache_dtype"):
        for name in new:
            cache.register_kv_cache_dtype(name)(_dtype_handler(name))
        return
    from pydantic.dataclasses import rebuild_dataclass

    # One object serves every `from ... import CacheDType`, the choices of the command line and the backend selector.
    cache.CacheDType.__args__ += new
    rebuild_dataclass(cache.CacheConfig, force=True)
    STR_DTYPE_TO_TORCH_DTYPE.update(dict.fromkeys(new, torch.uint8))
    if arguments := sys.modules.get("vllm.engine.arg_utils"):
        arguments._compute_kwargs.cache_clear()


def _dtype_handler(preset: str) -> type:
    import torch
    from vllm.v1.kv_cache_interface import KVQuantMode

    class Handler:
        name = preset

        def torch_dtype(self) -> torch.dtype:
            return torch.uint8

        def quant_mode(self) -> KVQuantMode:
            return KVQuantMode.CUSTOM

    return Handler
