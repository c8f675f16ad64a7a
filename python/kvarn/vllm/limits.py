# SPDX-License-Identifier: Apache-2.0
"""What kvarn cannot serve of a vLLM configuration, why, and what to do instead; `kvarn doctor` prints LIMITS."""

from collections.abc import Callable
from dataclasses import dataclass

import kvarn

from . import compat, contract, layers
from .refuse import USE_16_BIT, Refused, encoder_of, feedback_of, no_kernels, pack_of, page_tokens, prompts_of

# Proposers without attention of their own, and those whose layers attend causally to their own tokens, one draft after
# the other.
DRAFT_WITHOUT_LAYERS = ("ngram", "ngram_gpu", "suffix", "medusa", "mlp_speculator")
DRAFT_METHODS = (*DRAFT_WITHOUT_LAYERS, "eagle", "eagle3", "mtp", "draft_model")
# Connectors that hand over full blocks only: packed tiles, which nobody writes again.
WHOLE_BLOCK_CONNECTORS = ("OffloadingConnector",)


@dataclass(frozen=True)
class Limit:
    """One thing that cannot be served.

    what    in plain words
    remedy  what to do instead
    found   (preset, VllmConfig) -> what this configuration has of it, or None
    """

    what: str
    remedy: str
    found: Callable[[str, object], str | None]


def check_config(preset: str, config) -> None:
    """Raises Refused with every reason at once; `config` is a VllmConfig."""
    reasons = []
    for limit in LIMITS:
        if found := limit.found(preset, config):
            reasons.append(f"{found}; {limit.remedy}")
            if limit.found is _hooks:  # the other questions may not make sense to this vLLM
                break
    if reasons:
        raise Refused(f"--kv-cache-dtype {preset} cannot be served here:" + "".join(f"\n - {text}" for text in reasons))


def leave_windows(config) -> None:
    """Leaves the layers of `config` (a VllmConfig) that have a sliding window in 16 bits, as if a user had said so."""
    skipped = config.cache_config.kv_cache_dtype_skip_layers
    if not _has_windows(config) or "sliding_window" in skipped:
        return
    from vllm.logger import init_logger  # not needed by `kvarn doctor`, which only lists LIMITS

    skipped.append("sliding_window")
    init_logger("vllm.kvarn").info("kvarn: layers with a sliding window keep 16 bits; full-attention layers are packed")


def _hooks(preset, config):
    missing = [f"{hook.name} ({hook.detail})" for hook in contract.probe() if not hook.found]
    return f"this vLLM lacks {', '.join(missing)}" if missing else None


def _platform(preset, config):
    name = compat.platform_name()
    if name == "cpu":
        return None
    if name != "cuda":
        return f"this is vLLM's {name} platform"
    if not kvarn.cuda_shapes():
        return "this kvarn was built without CUDA kernels"
    found = compat.capability()
    return None if found is None or found >= (8, 0) else f"this GPU has compute capability {found[0]}.{found[1]}"


def _choices(preset, config):
    try:
        for choice in (encoder_of, prompts_of, feedback_of, pack_of):
            choice(config)
        layers.asked(config, preset)
    except Refused as error:
        return str(error)
    return None


def _presets(preset, config) -> list[str]:
    """That of the server, and those of some layers."""
    try:
        return list(dict.fromkeys([preset, *layers.asked(config, preset).values()]))
    except Refused:
        return [preset]


def _some_layers(preset, config):
    if len(_presets(preset, config)) == 1:
        return None
    beside = {
        "layers with a sliding window": _has_windows(config),
        "layers of other kinds": getattr(config.model_config, "is_hybrid", False),
        "pipeline parallelism": config.parallel_config.pipeline_parallel_size > 1,
        "a KV connector": config.kv_transfer_config is not None,
    }
    found = [words for words, is_there in beside.items() if is_there]
    return f"kvarn_layers beside {' and '.join(found)}" if found else None


def _model(attribute: str, words: str):
    return lambda preset, config: f"the model {words}" if getattr(config.model_config, attribute, False) else None


def _heads(preset, config):
    model, parallel = config.model_config, config.parallel_config
    if model is None or model.use_mla or model.is_attention_free:
        return None
    for name in _presets(preset, config):
        try:
            layout = kvarn.Layout(name, head_dim=model.get_head_size(), kv_heads=model.get_num_kv_heads(parallel))
        except ValueError as error:
            return str(error)
        if found := no_kernels(layout, model.get_num_attention_heads(parallel)):
            return found
    return None


def _has_windows(config) -> bool:
    return config.model_config is not None and config.model_config.get_sliding_window() is not None


def _windows(preset, config):
    disabled = _has_windows(config) and config.scheduler_config.disable_hybrid_kv_cache_manager
    return "the model has sliding-window layers and the hybrid KV cache manager is disabled" if disabled else None


def _chunked(preset, config):
    text = getattr(config.model_config, "hf_text_config", None)
    return "the model has chunked local attention" if getattr(text, "attention_chunk_size", None) else None


def _parallel(preset, config):
    parallel = config.parallel_config
    sizes = [getattr(parallel, f"{kind}_context_parallel_size", 1) for kind in ("decode", "prefill")]
    return "context parallelism is on" if max(sizes) > 1 else None


def _hybrid(preset, config):
    hybrid = getattr(config.model_config, "is_hybrid", False) and compat.platform_name() == "cpu"
    return "the model mixes attention with state-space layers, on a CPU" if hybrid else None


def _stages(preset, config):
    split = config.parallel_config.pipeline_parallel_size > 1 and config.cache_config.kv_cache_dtype_skip_layers
    return "pipeline parallelism with layers left in 16 bits" if split else None


def _block_size(preset, config):
    cache, tokens = config.cache_config, page_tokens(preset)
    if not cache.user_specified_block_size or cache.block_size % tokens == 0:  # vLLM's own choice will ask the backend
        return None
    return f"--block-size {cache.block_size} is not a multiple of {tokens}"


def _drafts(preset, config):
    drafts, model = config.speculative_config, config.model_config
    if drafts is None or model is None:
        return None
    if drafts.method not in DRAFT_METHODS:
        return f"speculative method {drafts.method}"
    if getattr(drafts, "parallel_drafting", False):
        return f"speculative method {drafts.method}, in parallel"
    if _heads(preset, config) or model.use_mla:
        return None
    head_dim, asked = model.get_head_size(), drafts.num_speculative_tokens
    most = min(kvarn.Layout(name, head_dim, 1).raw_tokens_per_page for name in _presets(preset, config))
    return f"{asked} drafts per step, where a page has room for {most}" if asked > most else None


def _connector(preset, config):
    if config.kv_transfer_config is None:
        return None
    name = getattr(config.kv_transfer_config, "kv_connector", None)
    return None if name in WHOLE_BLOCK_CONNECTORS else f"the KV connector {name} is configured"


def _two_batches(preset, config):
    return "dual batch overlap is on" if getattr(config.parallel_config, "enable_dbo", False) else None


LIMITS = (
    Limit("a vLLM that lacks a hook", "use vLLM 0.26 to 0.33, and see `kvarn doctor`", _hooks),
    Limit(
        "platforms other than CPUs and NVIDIA GPUs from compute capability 8.0 up",
        "use one of these, and a kvarn that was built where nvcc is",
        _platform,
    ),
    Limit("options of kvarn's that do not exist", "name one of these, or leave the option out", _choices),
    Limit("head sizes and ratios without kernels", USE_16_BIT, _heads),
    Limit("presets of some layers' own where pages must be of one size", "leave kvarn_layers out", _some_layers),
    Limit("multi-head latent attention (MLA)", USE_16_BIT, _model("use_mla", "has multi-head latent attention")),
    Limit("hybrid models with state-space or linear-attention layers, on CPUs", USE_16_BIT, _hybrid),
    Limit("encoder-decoder models", USE_16_BIT, _model("is_encoder_decoder", "has cross attention")),
    Limit("bidirectional prefixes", USE_16_BIT, _model("is_mm_prefix_lm", "attends to its prefix in both directions")),
    Limit("reference sliding windows", USE_16_BIT, _model("rswa_window", "has reference sliding windows")),
    Limit("chunked local attention", USE_16_BIT, _chunked),
    Limit("sliding windows without the hybrid KV cache manager", "leave it enabled", _windows),
    Limit("context parallelism", "use tensor, pipeline or data parallelism", _parallel),
    Limit("16-bit layers under pipeline parallelism", "pack every layer, or use tensor parallelism", _stages),
    Limit("blocks that are not whole tiles", "leave --block-size out", _block_size),
    Limit("too many drafts, or drafts in parallel", "use another method, or fewer drafts", _drafts),
    Limit(
        "KV connectors that may hand over unfinished tiles",
        "remove --kv-transfer-config; --kv-offloading-size is served",
        _connector,
    ),
    Limit("dual batch overlap", "leave --enable-dbo out", _two_batches),
)
