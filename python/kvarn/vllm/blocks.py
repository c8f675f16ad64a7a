# SPDX-License-Identifier: Apache-2.0
"""How many tokens a block has where packed layers share the block pool with layers of another kind.

vLLM's pool has blocks of one number of bytes. Windowed layers keep 16 bits: a block of as many tiles as hold one tile
raw (pages_ahead) has room for one tile of 16-bit tokens, and little more. The state of a state-space or linear
attention layer is one block: a block of packed tiles must be as large. vLLM itself would reckon a packed token as so
many bytes as it has elements, over four times what k4v2 takes.
"""

from dataclasses import replace

from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import MambaSpec, SlidingWindowSpec

import kvarn

from . import compat, refuse
from .hooks import is_ours, preset_of

logger = init_logger("vllm.kvarn")


def settle(config) -> None:
    """Settles the block size of `config` (a VllmConfig), once its layers exist, in place of vLLM's own choice."""
    layers, layouts = config.compilation_config.static_forward_context.values(), packed_layouts(config)
    if not layouts:
        raise refuse.Refused(
            f"--kv-cache-dtype {preset_of(config)}: every attention layer of this model has a sliding window or was "
            f"left in 16 bits, so that there is nothing to pack; {refuse.USE_16_BIT}"
        )
    states = [spec for layer in layers if isinstance(spec := _spec_of(layer, config), MambaSpec)]
    windows = any(getattr(layer, "sliding_window", None) is not None for layer in layers)
    page = min(map(page_bytes, layouts))
    state = max((replace(spec, page_size_padded=None).page_size_bytes for spec in states), default=0)
    tiles = max(-(-state // page), 1)
    if windows and _may_split():
        tiles = max(tiles, *(layout.pages_ahead for layout in layouts))
    tokens, cache = tiles * layouts[0].page_tokens, config.cache_config
    if not (states or windows) and cache.block_size % tokens == 0:
        return  # as the user asked, or vLLM chose for a model of packed layers only
    if cache.block_size != tokens:
        logger.info("kvarn: blocks of %d tokens, because of the layers that are not packed", tokens)
    cache.block_size = tokens
    if states:
        cache.mamba_page_size_padded = tiles * page
        if cache.mamba_cache_mode == "align":
            cache.mamba_block_size = tokens


def packed_layouts(config) -> list[kvarn.Layout]:
    """Of the layers that are packed, each layout once."""
    layers = config.compilation_config.static_forward_context.values()
    packed = [layer for layer in layers if is_ours(getattr(layer, "kv_cache_dtype", None))]
    kinds = dict.fromkeys((layer.kv_cache_dtype, layer.head_size, layer.num_kv_heads) for layer in packed)
    return [kvarn.Layout(*kind) for kind in kinds]


def _spec_of(layer, config):
    """vLLM's spec of a layer that is not attention, or None: layers of experts are listed too, and keep nothing."""
    keeps_state = hasattr(layer, "get_kv_cache_spec") and not hasattr(layer, "kv_cache_dtype")
    return layer.get_kv_cache_spec(config) if keeps_state else None


def page_bytes(layout) -> int:
    """Bytes of a page in vLLM's pool: whole bytes for each token, since a page of H records need not divide by its
    tokens (head_dim 80 and 96)."""
    return -(-layout.page_bytes // layout.page_tokens) * layout.page_tokens


def _may_split() -> bool:
    """Whether kernels may see a block in pieces, so that it has several tiles.

    vLLM 0.32 on CPUs zeroes the wrong rows then (spec.WindowManager): there one tile shares the pool with as few tokens
    as a kernel takes, and the smaller of the two is padded.
    """
    return compat.platform_name() != "cpu"


def of_windows(spec: SlidingWindowSpec, layout, block_tokens: int) -> dict:
    """What to change in vLLM's spec of a 16-bit windowed layer, in a pool whose blocks hold `block_tokens` packed ones.

    Blocks of as many tokens as have room, in the multiples of 16 that attention kernels want; a divisor, so that prefix
    hits end where both kinds of blocks do.
    """
    if not _may_split():
        return {"block_size": 32}
    pool = block_tokens // layout.page_tokens * page_bytes(layout)
    per_token = replace(spec, block_size=1, page_size_padded=None).page_size_bytes
    fitting = [n for n in range(16, block_tokens + 1, 16) if block_tokens % n == 0 and n * per_token <= pool]
    if not fitting:
        raise refuse.Refused(
            f"a windowed layer takes {16 * per_token} bytes for 16 tokens, a block of {block_tokens} packed tokens has "
            f"{pool}; {refuse.USE_16_BIT}"
        )
    return {"block_size": max(fitting), "page_size_padded": pool}
