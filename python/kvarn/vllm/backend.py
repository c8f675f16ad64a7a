# SPDX-License-Identifier: Apache-2.0
"""What vLLM may know of kvarn's attention before a layer exists, and what every layer has in common.

cpu   attention of a layer on the CPU
gpu   on NVIDIA GPUs: plans, CUDA graphs, prompts on FlashAttention
"""

from typing import ClassVar

import torch
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl, AttentionMetadataBuilder

import kvarn
from kvarn.energy import Feedback

from . import compat, refuse, spec

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
    def get_impl_cls() -> type[AttentionImpl]:
        return _kernels().Impl

    @staticmethod
    def get_builder_cls() -> type[AttentionMetadataBuilder]:
        return _kernels().Builder

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


def check_causal(batch) -> None:
    """Raises Refused if a step (vLLM's CommonAttentionMetadata) asks for another mask than the causal one."""
    if batch.causal is not True:
        raise refuse.Refused("kvarn serves causal attention only, this step asks for another mask")


def warn_replaced(count: int) -> None:
    """Once in the life of a process."""
    logger.warning_once(
        "kvarn: the model produced %d keys or values that are not finite or beyond 65504; they were replaced. "
        "Further cases are not reported.",
        count,
    )


def _kernels():
    """The module that computes on this platform."""
    if compat.platform_name() == "cuda":
        from . import gpu as kernels
    else:
        from . import cpu as kernels
    return kernels


class KvarnLayer(AttentionImpl):
    """One layer: what it was built for. `forward` is the platform's."""

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
        sinks: torch.Tensor | None = None,
        **others,
    ):
        self.layout = kvarn.Layout(kv_cache_dtype, head_dim=head_size, kv_heads=num_kv_heads or num_heads)
        refuse.check_impl(
            self.layout,
            num_heads,
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
        self.sinks = sinks  # a parameter of the model, [num_heads]: it has its values once weights are loaded
        self.encoder = refuse.encoder_of(get_current_vllm_config())
        self.feedback: Feedback | None = None  # once weights are loaded (feedback.py)

    def repack(self, preset: str) -> type[KvarnBackend]:
        """Another preset than the one that this layer was built for, before it has a cache. Returns its backend."""
        self.layout, self.kv_cache_dtype = self.layout_in(preset), preset
        return __getattr__(f"Backend_{preset}")

    def layout_in(self, preset: str) -> kvarn.Layout:
        return kvarn.Layout(preset, head_dim=self.head_size, kv_heads=self.num_kv_heads)

    def pages_of(self, kv_cache: torch.Tensor) -> torch.Tensor:
        """uint8 [pages, page_bytes] of vLLM's view of the layer's cache (KvarnBackend.get_kv_cache_shape)."""
        return kv_cache.flatten(1)[:, : self.layout.page_bytes]
