# SPDX-License-Identifier: Apache-2.0
"""Attention of a layer on the CPU: kvarn.append, then kvarn.attend, for the whole batch.

Prompts, chunks of prompts, single tokens and drafts take the same two calls in the order of the batch; the library
sorts out which rows lie in which tile. There is no state here beyond one scratch buffer.
"""

from dataclasses import dataclass

import torch
from vllm.v1.attention.backend import AttentionMetadata, AttentionMetadataBuilder

import kvarn

from .backend import KvarnLayer, check_causal, warn_replaced


@dataclass
class Metadata(AttentionMetadata):
    """The batch of one step, as the library wants it; views of vLLM's own buffers where possible."""

    num_tokens: int
    block_table: torch.Tensor  # int32 [requests, width]
    seq_lens: torch.Tensor  # int32 [requests], with this step's tokens; 0: takes no part
    query_starts: torch.Tensor  # int32 [requests + 1]
    workspace: torch.Tensor  # uint8


class Builder(AttentionMetadataBuilder[Metadata]):
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

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False) -> Metadata:
        batch = common_attn_metadata
        check_causal(batch)
        query_starts = batch.query_start_loc[: batch.num_reqs + 1]
        # Dummy runs (warm-up, idle data-parallel ranks) come with lengths and with block table rows of an earlier
        # batch; only their slots, all -1, say that nothing may be written.
        first_slots = batch.slot_mapping[query_starts[:-1].clamp(max=batch.slot_mapping.shape[0] - 1)]
        return Metadata(
            num_tokens=int(query_starts[-1]),
            block_table=batch.block_table_tensor[: batch.num_reqs],
            seq_lens=batch.seq_lens[: batch.num_reqs].masked_fill(first_slots < 0, 0),
            query_starts=query_starts,
            workspace=_workspace(self.workspace_bytes),
        )


class Impl(KvarnLayer):
    """One layer."""

    def forward(
        self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale=None, output_block_scale=None
    ) -> torch.Tensor:
        """query, output [tokens, heads, head_dim]; key, value [tokens, kv_heads, head_dim]; kv_cache uint8, 4-D."""
        if attn_metadata is None:  # a profiling run: there is no cache yet
            return output.fill_(0)
        step = attn_metadata
        batch = (self.layout, self.pages_of(kv_cache), step.block_table, step.seq_lens, step.query_starts)
        n = step.num_tokens
        matrix, balance = self.feedback or (None, None)
        options = {"workspace": step.workspace, "balance": balance}
        replaced = kvarn.append(*batch, key[:n], value[:n], encoder=self.encoder, feedback=matrix, **options)
        if replaced:
            warn_replaced(replaced)
        kvarn.attend(*batch, query[:n], scale=self.scale, soft_cap=self.soft_cap, out=output[:n], **options)
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
