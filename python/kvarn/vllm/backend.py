# SPDX-License-Identifier: Apache-2.0
"""Attention of a layer: kvarn.append, then kvarn.attend, for the whole batch, whatever its requests are doing.

Prompts, chunks of prompts, single tokens and drafts take the same two calls in the order of the batch; the library
sorts out which rows lie in which tile. There is no state here beyond one scratch buffer.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl, AttentionMetadata, AttentionMetadataBuilder

import kvarn

from . import refuse, spec

logger = init_logger("vllm.kvarn")


def path_of(preset: str) -> str:
    """The import path of the backend class of `preset`."""
    return f"{__name__}.Backend_{preset}"


def __getattr__(name: str) -> type["KvarnBackend"]:
    """One backend class for each preset, made when it is first named: vLLM asks the class, not an object of it."""
    stem, _, preset = name.partition("Backend_")
    if stem or not preset:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made = type(name, (KvarnBackend,), {"preset": preset, "__module__": __name__})
    return globals().setdefault(name, made)


class KvarnBackend(AttentionBackend):
    """What vLLM may know about us before a layer exists."""

    preset: ClassVar[str]
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16, torch.float16, torch.float32]
    accept_output_buffer = True

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"  # must be a member of vLLM's enumeration of backends

    @staticmethod
    def get_impl_cls() -> type["KvarnImpl"]:
        return KvarnImpl

    @staticmethod
    def get_builder_cls() -> type["KvarnBuilder"]:
        return KvarnBuilder

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return []

    @classmethod
    def supports_kv_cache_dtype(cls, kv_cache_dtype: str | None) -> bool:
        return kv_cache_dtype == cls.preset

    @classmethod
    def get_supported_kernel_block_sizes(cls, kv_cache_spec=None) -> list[int]:
        return [refuse.page_tokens(cls.preset)]

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return True

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False

    @classmethod
    def customize_spec(cls, made):
        """Asked for sizes before layers exist (0.28 and later); a layer's own spec comes packed from spec.of_layer."""
        is_ours = made.dtype == torch.uint8 and not isinstance(made, spec.KvarnSpec)
        return spec.packed(made, cls.preset) if is_ours else made

    @classmethod
    def get_kv_cache_shape(
        cls, num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> tuple[int, ...]:
        """The cache of a layer, uint8, up to 0.28; later releases derive the same shape from the spec."""
        layout = kvarn.Layout(cls.preset, head_dim=head_size, kv_heads=num_kv_heads)
        return (num_blocks, 1, block_size, -(-layout.page_bytes // layout.page_tokens))


@dataclass
class KvarnMetadata(AttentionMetadata):
    """The batch of one step, as the library wants it; views of vLLM's own buffers where possible."""

    num_tokens: int
    block_table: torch.Tensor  # int32 [requests, width]
    seq_lens: torch.Tensor  # int32 [requests], with this step's tokens; 0: takes no part
    query_starts: torch.Tensor  # int32 [requests + 1]
    workspace: torch.Tensor  # uint8


class KvarnBuilder(AttentionMetadataBuilder[KvarnMetadata]):
    """Turns vLLM's description of a step into ours."""

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        scheduler = vllm_config.scheduler_config
        layers = vllm_config.compilation_config.static_forward_context
        self.workspace_bytes = max(
            kvarn.workspace_bytes(
                impl.layout,
                tokens=scheduler.max_num_batched_tokens,
                requests=scheduler.max_num_seqs,
                query_heads=impl.num_heads,
                max_seq_len=vllm_config.model_config.max_model_len,
            )
            for impl in (layers[name].impl for name in layer_names)
        )

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False) -> KvarnMetadata:
        batch = common_attn_metadata
        if batch.causal is not True:
            raise refuse.Refused("kvarn serves causal attention only, this step asks for another mask")
        query_starts = batch.query_start_loc[: batch.num_reqs + 1]
        # Dummy runs (warm-up, idle data-parallel ranks) come with lengths and with block table rows of an earlier
        # batch; only their slots, all -1, say that nothing may be written.
        first_slots = batch.slot_mapping[query_starts[:-1].clamp(max=batch.slot_mapping.shape[0] - 1)]
        return KvarnMetadata(
            num_tokens=int(query_starts[-1]),
            block_table=batch.block_table_tensor[: batch.num_reqs],
            seq_lens=batch.seq_lens[: batch.num_reqs].masked_fill(first_slots < 0, 0),
            query_starts=query_starts,
            workspace=_workspace(self.workspace_bytes),
        )


class KvarnImpl(AttentionImpl[KvarnMetadata]):
    """One layer."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        **others,
    ):
        refuse.check_impl(
            kv_cache_dtype,
            attn_type=attn_type,
            alibi_slopes=alibi_slopes,
            sliding_window=sliding_window,
            kv_sharing_target_layer_name=kv_sharing_target_layer_name,
            **others,
        )
        self.num_heads = num_heads
        self.head_size = head_size
        self.num_kv_heads = num_kv_heads or num_heads
        self.scale = float(scale)
        self.kv_cache_dtype = kv_cache_dtype
        self.soft_cap = float(logits_soft_cap or 0.0)
        self.layout = kvarn.Layout(kv_cache_dtype, head_dim=head_size, kv_heads=self.num_kv_heads)
        self.encoder = refuse.encoder_of(get_current_vllm_config())

    def forward(
        self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale=None, output_block_scale=None
    ) -> torch.Tensor:
        """query, output [tokens, heads, head_dim]; key, value [tokens, kv_heads, head_dim]; kv_cache uint8, 4-D."""
        if attn_metadata is None:  # a profiling run: there is no cache yet
            return output.fill_(0)
        step = attn_metadata
        pages = kv_cache.flatten(1)[:, : self.layout.page_bytes]
        batch = (self.layout, pages, step.block_table, step.seq_lens, step.query_starts)
        n = step.num_tokens
        replaced = kvarn.append(*batch, key[:n], value[:n], workspace=step.workspace, encoder=self.encoder)
        if replaced:
            logger.warning_once(
                "kvarn: the model produced %d keys or values in one step and layer that are not finite or beyond "
                "65504; they were replaced. Further cases are not reported.",
                replaced,
            )
        kvarn.attend(
            *batch, query[:n], scale=self.scale, soft_cap=self.soft_cap, out=output[:n], workspace=step.workspace
        )
        return output


_scratch = torch.empty(0, dtype=torch.uint8)


def _workspace(size: int) -> torch.Tensor:
    """At least `size` bytes that all layers of this process share: a step uses them one layer at a time.

    Sized for the worst step, yet free until touched: the system backs memory only where something was written.
    """
    global _scratch
    if _scratch.numel() < size:
        _scratch = torch.empty(size, dtype=torch.uint8)
    return _scratch
