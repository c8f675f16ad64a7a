# SPDX-License-Identifier: Apache-2.0
"""Attention of prompts on FlashAttention.

Every query tile, the rows of one request in one tile, is a sequence of its own: its keys are the expanded tiles before
it and last its own tile raw, so that the bottom-right causal mask is exactly kvarn's semantics (docs/kernels.md). Keys
and values lie rotated; queries are rotated before, the output back after.
"""

from dataclasses import dataclass

import torch
import vllm.envs
from vllm.v1.attention.backends import fa_utils

from kvarn import cuda

from . import refuse


def flash_version(config, head_dim: int, has_sinks: bool) -> int | None:
    """Which FlashAttention computes prompts; None: kvarn's attention does, as asked, or because there is none."""
    exact = refuse.prompts_of(config) == "exact" or vllm.envs.VLLM_BATCH_INVARIANT
    if exact or not fa_utils.is_flash_attn_varlen_func_available():
        return None
    if has_sinks and not fa_utils.flash_attn_supports_sinks():
        return None
    return fa_utils.get_flash_attn_version(head_size=head_dim)


@dataclass
class Group:
    """Requests whose pages fit into the room together."""

    requests: range
    sequences: int  # query tiles
    longest: int  # keys of a sequence, at most


@dataclass
class Step:
    """The prompts of a step."""

    plan: cuda.Plan  # of the whole step
    groups: list[Group]
    first_row: int
    room: object  # memory.Prompts

    @classmethod
    def of(cls, batch, first: int, plan, room) -> "Step":
        """Of vLLM's batch, from request `first` on."""
        tile = plan.layout.page_tokens
        starts = batch.query_start_loc_cpu.tolist()
        known = batch.seq_lens_cpu_upper_bound  # exact for prompts; some dummy steps leave it out, and may wait
        lengths = (batch.seq_lens if known is None else known).tolist()
        groups, used = [], 0
        for request in range(first, batch.num_reqs):
            length, rows = lengths[request], starts[request + 1] - starts[request]
            if rows == 0:  # padding
                continue
            last = (length - 1) // tile
            sequences = last - (length - rows) // tile + 1
            pages = last + sequences
            if not groups or used + pages > room.pages:
                groups.append(Group(range(request, request), 0, 0))
                used = 0
            group, used = groups[-1], used + pages
            group.requests = range(group.requests.start, request + 1)
            group.sequences += sequences
            group.longest = max(group.longest, length)
        return cls(plan, groups, starts[first], room)

    def attend(self, pages, query, output, flash: int, scale: float, soft_cap: float, sinks, balance) -> None:
        """query, output [tokens, heads, head_dim] of the whole step; rows from `first_row` on are written.

        sinks    None, or [heads], as the model has them
        balance  None, or float32 [kv_heads, head_dim], as append had it
        """
        room, layout = self.room, self.plan.layout
        rotated, mine = torch.empty_like(query), query[self.first_row :]
        if balance is not None:
            mine = (mine.unflatten(1, (layout.kv_heads, -1)) * balance[:, None]).flatten(1, 2)  # float32: exact
        cuda.rotate(mine, out=rotated[self.first_row :])
        paged = (room.pages, layout.page_tokens, layout.kv_heads, layout.head_dim)
        for group in self.groups:
            n = group.sequences
            cuda.prefill_pages(
                self.plan, pages, room.block_table, room.seq_lens, room.query_starts, room.k, room.v, room.overflow,
                group.requests,
            )  # fmt: skip
            fa_utils.flash_attn_varlen_func(
                q=rotated,
                k=room.k.view(paged),
                v=room.v.view(paged),
                out=output,
                cu_seqlens_q=room.query_starts[: n + 1],
                max_seqlen_q=layout.page_tokens,
                seqused_k=room.seq_lens[:n],
                max_seqlen_k=group.longest,
                block_table=room.block_table[:n],
                softmax_scale=scale,
                causal=True,
                softcap=soft_cap,
                num_splits=1,  # one pass over the keys: a row's bits do not depend on what else is in the step
                fa_version=flash,
                s_aux=sinks,
            )
        cuda.rotate(output[self.first_row :], out=output[self.first_row :])
