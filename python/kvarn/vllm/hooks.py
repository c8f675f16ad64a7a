# SPDX-License-Identifier: Apache-2.0
"""What vLLM asks of us, in the order in which it asks. Light to import: the answers load what they need."""


def preset_of(vllm_config) -> str | None:
    """The preset this vLLM was started with, or None if it did not ask for kvarn."""
    cache_config = getattr(vllm_config, "cache_config", None)
    name = getattr(cache_config, "cache_dtype", None)
    return name if is_ours(name) else None


def is_ours(cache_dtype) -> bool:
    """Whether the cache of a layer, or of a server, is packed."""
    return isinstance(cache_dtype, str) and cache_dtype.startswith("kvarn_")


def check_config(vllm_config) -> None:
    """A configuration is complete. Raises refuse.Refused if it cannot be served."""
    preset = preset_of(vllm_config)
    if preset is not None:
        from . import limits

        limits.check_config(preset, vllm_config)
        limits.leave_windows(vllm_config)


def settle_blocks(vllm_config) -> None:
    """The model's layers exist and vLLM chose a block size: now ours for models that do not only have packed layers."""
    preset = preset_of(vllm_config)
    if preset is not None:
        from . import blocks, layers

        layers.settle(vllm_config, preset)
        blocks.settle(vllm_config)


def backend_path(selector) -> str | None:
    """Which attention backend serves a layer (an AttentionSelectorConfig): the path of ours, or None for vLLM's."""
    preset = selector.kv_cache_dtype
    if not is_ours(preset):
        return None
    from . import backend, compat, refuse

    refuse.check_layer(preset, selector)
    _for_both_sides()
    compat.wrap_layer_spec(layer_spec)
    compat.after_loading(weights_loaded)
    if compat.platform_name() == "cuda":
        compat.mix_windows(preset_of)
    return backend.path_of(preset)


def weights_loaded(model, model_config) -> None:
    """The weights of a model with packed layers are in their places, nothing has run yet."""
    from . import feedback

    feedback.settle(model, model_config)


def register_specs(vllm_config) -> None:
    """vLLM's own cache specs are registered; ours come next."""
    from . import offload, spec

    spec.register()
    _for_both_sides()
    if vllm_config.kv_transfer_config is not None and preset_of(vllm_config) is not None:
        offload.install()


def _for_both_sides() -> None:
    """What scheduler and workers have to agree on: with tensor parallelism they are processes of their own, and only
    the scheduler's registers specs, only the workers' have layers."""
    from . import compat

    compat.widen_mixed_rows()
    compat.zero_windows()


def layer_spec(layer, made, vllm_config):
    """How a layer's pages look: `made` is vLLM's answer, ours is returned."""
    if preset_of(vllm_config) is None:
        return made
    from . import spec

    return spec.of_layer(layer, made, vllm_config)
