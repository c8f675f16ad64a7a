# SPDX-License-Identifier: Apache-2.0
"""Pages in vLLM's terms: how many bytes a block takes, and the pages ahead that every running request holds.

The unfinished tile of a request lies raw in the pages after its last one (docs/specification.md section 3). vLLM's
scheduler gives them to it because our manager counts every request `tokens_ahead` tokens longer than it is. Admission,
preemption, the width of a block table row and the reported capacity all follow from that one addition.
"""

from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager, SlidingWindowManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

import kvarn

from . import blocks, compat, refuse
from .hooks import is_ours


@dataclass(frozen=True, kw_only=True)
class AheadSpec(FullAttentionSpec):
    """A full-attention layer whose requests hold pages ahead.

    As it stands it is for the layers that a user left in 16 bits: they share block ids with the packed layers, so they
    must count alike, though they never touch the additional pages.
    """

    tokens_ahead: int = 0

    @classmethod
    def of(cls, spec: FullAttentionSpec, **changes) -> Self:
        """`spec`, field by field, as a spec of this class."""
        return cls(**(_fields(spec) | changes))

    def max_memory_usage_bytes(self, vllm_config) -> int:
        tokens = vllm_config.model_config.max_model_len + self.tokens_ahead
        return -(-tokens // self.block_size) * self.page_size_bytes

    def max_num_blocks_per_req(self, vllm_config, max_len: int) -> int:
        return super().max_num_blocks_per_req(vllm_config, max_len + self.tokens_ahead)

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """The one spec of a group of equal layers; vLLM's merge would lose the fields it does not know."""
        merged = super().merge(specs)
        own = {f.name: getattr(specs[0], f.name) for f in fields(cls)}
        own = {name: value for name, value in own.items() if name not in FullAttentionSpec.__dataclass_fields__}
        if any(getattr(spec, name) != value for spec in specs for name, value in own.items()):
            # What vLLM expects of specs that cannot be merged: it then keeps them side by side (kvarn_layers).
            raise AssertionError(f"layers that share a spec must agree on {sorted(own)}, got {specs}")
        return replace(merged, **own)


@dataclass(frozen=True, kw_only=True)
class KvarnSpec(AheadSpec):
    """A packed layer. A page is opaque to vLLM: one head slot of `bytes_per_token` for each token, as uint8."""

    bytes_per_token: int = 0

    @property
    def num_heads(self) -> int:
        return 1

    @property
    def state_content_size_bytes(self) -> int:
        return self.bytes_per_token

    @property
    def real_page_size_bytes(self) -> int:
        return self.block_size * self.bytes_per_token

    @property
    def unpadded_page_size_bytes(self) -> int:
        return self.real_page_size_bytes


@dataclass(frozen=True, kw_only=True)
class WindowSpec(SlidingWindowSpec):
    """A 16-bit windowed layer of a model whose other layers are packed."""

    @classmethod
    def of(cls, spec: SlidingWindowSpec, **changes) -> Self:
        return cls(**(_fields(spec) | changes))


def _fields(spec) -> dict:
    return {f.name: getattr(spec, f.name) for f in fields(spec) if f.init}


class KvarnManager(FullAttentionManager):
    """Full attention for requests that hold pages ahead, counted in tokens, since a block may hold many tiles."""

    # Only packed data exists for other requests to hit, so a hit must end at a tile edge.
    supports_fine_grained_hash_lookup = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._record_new_block_ids = False  # to be zeroed: the library reads nothing that was not written

    def get_num_blocks_to_allocate(self, request_id: str, num_tokens: int, *args, **kwargs) -> int:
        num_tokens += self.kv_cache_spec.tokens_ahead
        return super().get_num_blocks_to_allocate(request_id, num_tokens, *args, **kwargs)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, *args, **kwargs):
        num_tokens += self.kv_cache_spec.tokens_ahead
        return super().allocate_new_blocks(request_id, num_tokens, *args, **kwargs)


class WindowManager(SlidingWindowManager):
    """Windowed layers, whose new blocks have to be zeroed: a packed page that was there before may read as NaN, and
    vLLM's attention multiplies what it masks by zero."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._record_new_block_ids = True


def register() -> None:
    """Tells vLLM which manager serves our specs. They group with its own kind, as an isinstance test would anyway."""
    for spec in (KvarnSpec, AheadSpec):
        KVCacheSpecRegistry.register(spec, KvarnManager, uniform_type_base_spec=FullAttentionSpec)
    KVCacheSpecRegistry.register(WindowSpec, WindowManager, uniform_type_base_spec=SlidingWindowSpec)


def packed(spec: FullAttentionSpec, preset: str, tokens_ahead: int | None = None) -> KvarnSpec:
    """A layer's full-attention spec as `preset` packs it. Raises refuse.Refused for any other kind of layer."""
    if type(spec) is not FullAttentionSpec or spec.head_size_v != spec.head_size:
        raise refuse.Refused(
            f"--kv-cache-dtype {preset} packs full attention with keys and values of one size; "
            f"a layer of this model has {spec}; {refuse.USE_16_BIT}"
        )
    layout = kvarn.Layout(preset, head_dim=spec.head_size, kv_heads=spec.num_kv_heads)
    return KvarnSpec.of(
        spec,
        dtype=torch.uint8,
        tokens_ahead=layout.pages_ahead * layout.page_tokens if tokens_ahead is None else tokens_ahead,
        bytes_per_token=blocks.page_bytes(layout) // layout.page_tokens,
    )


def of_layer(layer, made, vllm_config):
    """The spec of `layer` (an Attention module) in a model served with a preset, where vLLM `made` its own.

    All full-attention layers of the model hold the same number of tokens ahead, packed or not, because vLLM lets them
    share block ids and asks the first one's manager for all. Layers with windows get blocks that fit into a packed
    layer's. Other kinds of 16-bit layers keep vLLM's spec.
    """
    packs = is_ours(layer.kv_cache_dtype)
    if made is None or (type(made) not in (FullAttentionSpec, SlidingWindowSpec) and not packs):
        return made
    layouts = blocks.packed_layouts(vllm_config)
    if not packs and type(made) is SlidingWindowSpec:
        smallest = min(layouts, key=blocks.page_bytes)
        return WindowSpec.of(made, **blocks.of_windows(made, smallest, vllm_config.cache_config.block_size))
    tokens_ahead = max(layout.pages_ahead * layout.page_tokens for layout in layouts)
    compat.widen_rows(tokens_ahead)
    if packs:
        return packed(made, layer.kv_cache_dtype, tokens_ahead)
    return AheadSpec.of(made, tokens_ahead=tokens_ahead)
