# SPDX-License-Identifier: Apache-2.0
"""The names of vLLM that kvarn relies on: which hooks a release has, found in its sources without importing any of it.

To serve another release, run `probe` on its sources (tests/vllm/extract_contract.py) and add an alternative to the hook
that it misses, here and in compat.
"""

import functools
import importlib.util
from pathlib import Path
from typing import NamedTuple

from . import source


class Hook(NamedTuple):
    name: str
    found: bool
    detail: str  # which alternative was found, or what was looked for


class Name(NamedTuple):
    """A name that must exist in a module, with at least these parameters if it is a function."""

    module: str
    name: str
    parameters: tuple[str, ...] = ()


def _names(**modules: str) -> tuple[Name, ...]:
    """Of modules, named as in _MODULES, each with the names it must have: "NAME Class.field Class.method(argument)"."""
    return tuple(
        Name(_MODULES[module], text.partition("(")[0], tuple(filter(None, text.partition("(")[2][:-1].split(","))))
        for module, texts in modules.items()
        for text in texts.split()
    )


_MODULES = {
    "arguments": "vllm.engine.arg_utils",
    "backend": "vllm.v1.attention.backend",
    "backends": "vllm.v1.attention.backends.registry",
    "cache": "vllm.config.cache",
    "config": "vllm.config.vllm",
    "context": "vllm.forward_context",
    "flash": "vllm.v1.attention.backends.flash_attn",
    "flash_utils": "vllm.v1.attention.backends.fa_utils",
    "layer": "vllm.model_executor.layers.attention.attention",
    "loaded": "vllm.model_executor.model_loader.utils",
    "manager": "vllm.v1.core.single_type_kv_cache_manager",
    "model": "vllm.config.model",
    "offload": "vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler",
    "platform": "vllm.platforms.interface",
    "registry": "vllm.v1.kv_cache_spec_registry",
    "runner_2": "vllm.v1.worker.gpu.model_runner",
    "scheduler": "vllm.config.scheduler",
    "selector": "vllm.v1.attention.selector",
    "rows_2": "vllm.v1.worker.gpu.block_table",
    "spec": "vllm.v1.kv_cache_interface",
    "speculative": "vllm.config.speculative",
    "torch": "vllm.utils.torch_utils",
}

# Hook -> alternatives, newest first: what to call it, and the names it needs.
HOOKS = {
    "cache dtype": {
        "register_kv_cache_dtype": _names(cache="register_kv_cache_dtype(name)", torch="STR_DTYPE_TO_TORCH_DTYPE"),
        "CacheDType literal": _names(cache="CacheDType", arguments="_compute_kwargs", torch="STR_DTYPE_TO_TORCH_DTYPE"),
    },
    "configuration check": {
        "platform": _names(
            platform="Platform.check_and_update_config(vllm_config)",
            cache="CacheConfig.cache_dtype CacheConfig.block_size CacheConfig.user_specified_block_size "
            "CacheConfig.kv_cache_dtype_skip_layers",
            config="VllmConfig.additional_config VllmConfig.kv_transfer_config",
            model="ModelConfig.use_mla ModelConfig.is_hybrid ModelConfig.is_attention_free "
            "ModelConfig.is_encoder_decoder ModelConfig.get_head_size ModelConfig.get_num_kv_heads "
            "ModelConfig.get_num_attention_heads ModelConfig.get_sliding_window",
            scheduler="SchedulerConfig.disable_hybrid_kv_cache_manager",
            speculative="SpeculativeConfig.method SpeculativeConfig.num_speculative_tokens",
        )
    },
    "backend choice": {
        "platform, named CUSTOM": _names(
            platform="Platform.get_attn_backend_cls(attn_selector_config)",
            backends="AttentionBackendEnum.CUSTOM",
            selector="AttentionSelectorConfig.kv_cache_dtype AttentionSelectorConfig.head_size "
            "AttentionSelectorConfig.attn_type AttentionSelectorConfig.use_mla AttentionSelectorConfig.use_sparse "
            "AttentionSelectorConfig.has_sink AttentionSelectorConfig.use_mm_prefix",
        )
    },
    "cache spec": {
        "registered by the platform": _names(
            platform="Platform.register_custom_kv_cache_specs(vllm_config)",
            registry="KVCacheSpecRegistry.register(manager_class,uniform_type_base_spec)",
            layer="Attention.get_kv_cache_spec(vllm_config)",
        )
    },
    "pages ahead": {
        "manager and spec": _names(
            manager="FullAttentionManager.get_num_blocks_to_allocate(request_id,num_tokens) "
            "FullAttentionManager.allocate_new_blocks(request_id,num_tokens) "
            "FullAttentionManager.supports_fine_grained_hash_lookup",
            spec="FullAttentionSpec.max_num_blocks_per_req(vllm_config,max_len) "
            "FullAttentionSpec.max_memory_usage_bytes(vllm_config) FullAttentionSpec.merge(specs)",
        )
    },
    "block size": {
        "settled by the platform": _names(
            platform="Platform.update_block_size_for_backend(vllm_config)",
            cache="CacheConfig.mamba_page_size_padded CacheConfig.mamba_block_size CacheConfig.mamba_cache_mode",
            spec="MambaSpec.page_size_padded SlidingWindowSpec.page_size_padded SlidingWindowSpec.block_size",
        )
    },
    "offloaded blocks": {
        "the connector's scheduler": _names(
            offload="OffloadingConnectorScheduler.__init__(spec,vllm_config,kv_cache_config) "
            "OffloadingConnectorScheduler.get_num_new_matched_tokens(request,num_computed_tokens)"
        )
    },
    "zeroed blocks": {
        "managers record them": _names(
            manager="SingleTypeKVCacheManager.take_new_block_ids", spec="KVCacheConfig.needs_kv_cache_zeroing"
        )
    },
    "page size": {
        "head slots of bytes": _names(
            spec="FullAttentionSpec.num_heads FullAttentionSpec.state_content_size_bytes "
            "FullAttentionSpec.unpadded_page_size_bytes"
        ),
        "real_page_size_bytes": _names(spec="FullAttentionSpec.real_page_size_bytes"),
    },
    "cache view": {
        "from the spec": _names(spec="compute_layer_kv_cache_shape_bytes(spec,num_blocks)"),
        "get_kv_cache_shape": _names(backend="AttentionBackend.get_kv_cache_shape(cache_dtype_str)"),
    },
    "attention": {
        "impl and builder": _names(
            backend="AttentionImpl.forward(layer,query,key,value,kv_cache,attn_metadata,output) "
            "AttentionImpl.__init__(num_heads,head_size,scale,num_kv_heads,kv_cache_dtype,logits_soft_cap) "
            "AttentionMetadataBuilder.__init__(kv_cache_spec,layer_names,vllm_config,device) "
            "AttentionMetadataBuilder.build(common_prefix_len,common_attn_metadata,fast_build) "
            "CommonAttentionMetadata.query_start_loc CommonAttentionMetadata.seq_lens CommonAttentionMetadata.causal "
            "CommonAttentionMetadata.num_reqs CommonAttentionMetadata.num_actual_tokens "
            "CommonAttentionMetadata.block_table_tensor CommonAttentionMetadata.slot_mapping"
        )
    },
    "queries of a model": {
        "weights loaded, one run": _names(
            loaded="process_weights_after_loading(model,model_config)",
            context="set_forward_context(attn_metadata,vllm_config,num_tokens,skip_compiled)",
            layer="Attention.forward(query,key,value,output_shape,output_dtype)",
        )
    },
    "attention on GPUs": {
        "graphs, FlashAttention": _names(
            backend="AttentionCGSupport.UNIFORM_BATCH AttentionImplBase.process_weights_after_loading(act_dtype) "
            "AttentionMetadataBuilder._init_reorder_batch_threshold(reorder_batch_threshold,supports_spec_as_decode) "
            "CommonAttentionMetadata.query_start_loc_cpu CommonAttentionMetadata.max_query_len "
            "CommonAttentionMetadata.seq_lens_cpu_upper_bound",
            flash="_get_sliding_window_configs(vllm_config)",
            flash_utils="get_flash_attn_version(head_size) is_flash_attn_varlen_func_available "
            "flash_attn_supports_sinks",
            rows_2="BlockTables.__init__(max_num_blocks_per_group,block_sizes)",
        )
    },
}


@functools.cache
def probe(root: Path | None = None) -> list[Hook]:
    """Which hooks a vLLM has, judged by its sources: nothing of it is imported.

    root  the folder that holds the package `vllm`; None: the one that this Python would import
    """
    root = root or installed_root()
    if root is None:
        return [Hook("vllm", False, "not installed")]
    return judge(functools.cache(lambda module: source.names_of(root, module) or {}))


def judge(names_of) -> list[Hook]:
    """The same from any source of names: `names_of(module)` -> source.Names."""

    def exists(name: Name) -> bool:
        try:
            parameters = source.lookup(names_of(name.module), name.name)
        except KeyError:
            return False
        return not name.parameters or set(name.parameters) <= set(parameters or ())

    def hook(title: str, alternatives: dict[str, tuple[Name, ...]]) -> Hook:
        for words, names in alternatives.items():
            if all(map(exists, names)):
                return Hook(title, True, words)
        missing = [
            f"{name.module}.{name.name}" for names in alternatives.values() for name in names if not exists(name)
        ]
        return Hook(title, False, "no " + ", no ".join(missing))

    return [hook(title, alternatives) for title, alternatives in HOOKS.items()]


def installed_root() -> Path | None:
    """The folder that holds the installed package `vllm`."""
    found = importlib.util.find_spec("vllm")
    return Path(found.origin).parent.parent if found and found.origin else None


@functools.cache
def runner_2_asks_spec(root: Path | None = None) -> bool:
    """Whether model runner 2 takes the width of a block table row from the spec (0.29 and later)."""
    root = root or installed_root()
    return root is not None and source.mentions(root, _MODULES["runner_2"], "max_num_blocks_per_req")
