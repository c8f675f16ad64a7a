# SPDX-License-Identifier: Apache-2.0
"""Hits in host memory (--kv-offloading-size): whole blocks, and never a request's last token.

vLLM's connector may find all of a request's tokens, and the scheduler then computes the last one again: a token of a
tile of which there is only the packed page. vLLM's own prefix cache stops a block earlier; with this, so does the
connector.
"""

from . import compat


def install() -> None:
    """Makes the connector's scheduler round its answers down where groups hold packed layers."""
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import OffloadingConnectorScheduler

    from .spec import AheadSpec

    def __init__(inner, scheduler, spec, vllm_config, kv_cache_config, *args, **kwargs):
        inner(scheduler, spec, vllm_config, kv_cache_config, *args, **kwargs)
        specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
        packs = any(isinstance(one, AheadSpec) for spec in specs for one in _layers_of(spec))
        scheduler.kvarn_block = max(spec.block_size for spec in specs) if packs else None

    def get_num_new_matched_tokens(inner, scheduler, request, num_computed_tokens, *args, **kwargs):
        found, later = inner(scheduler, request, num_computed_tokens, *args, **kwargs)
        if not found or scheduler.kvarn_block is None:
            return found, later
        whole = whole_blocks(num_computed_tokens + found, request.num_tokens, scheduler.kvarn_block)
        found = max(0, whole - num_computed_tokens)
        return found, later and found > 0

    for around in (__init__, get_num_new_matched_tokens):
        compat.wrap(OffloadingConnectorScheduler, around.__name__, around)


def whole_blocks(found: int, tokens: int, block: int) -> int:
    """How many of the first `found` of a request's `tokens` it may start with."""
    return min(found, tokens - 1) // block * block


def _layers_of(spec) -> list:
    """The specs in a group's spec, which may be one for each layer."""
    return list(getattr(spec, "kv_cache_specs", {0: spec}).values())
