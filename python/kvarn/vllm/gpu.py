# SPDX-License-Identifier: Apache-2.0
"""Attention of a layer on NVIDIA GPUs.

A step is planned once, on the device, when vLLM builds its metadata: outside any CUDA graph, into memory whose address
never changes, so that a captured step replays with whatever was planned last. Then every layer appends and attends;
the last one packs what the step completed (pack).

Requests that decode, drafts included, are kvarn's attention. Prompts go to FlashAttention over 16-bit pages (prompts);
where there is none, or kvarn_prompts is "exact", or vLLM runs batch-invariant, kvarn's attention takes them too: a row
gets the same bits whether it came with a prompt, a chunk of one, alone or as a draft.
"""

from dataclasses import dataclass

import torch
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadata, AttentionMetadataBuilder

import kvarn
from kvarn import cuda

from . import memory, prompts
from .backend import KvarnLayer, check_causal
from .pack import Pack


@dataclass
class Metadata(AttentionMetadata):
    """The plans of one step. Nothing here is read from the device."""

    tokens: int  # rows of the step
    append: cuda.Plan
    attend: cuda.Plan | None  # of the requests that kvarn's attention computes, the leading ones
    prompts: prompts.Step | None
    replaced: torch.Tensor


class Builder(AttentionMetadataBuilder[Metadata]):
    """Plans a step from vLLM's description of it."""

    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        layers = vllm_config.compilation_config.static_forward_context
        self.layer = layers[layer_names[0]].impl
        self.memory = memory.reserve(self.layer, vllm_config, device, layer_names[0])
        self.pack = Pack.of([layers[name].impl for name in layer_names], vllm_config)
        for name in layer_names:
            layers[name].impl.pack = self.pack
        self.decode_query = self.memory.most.query

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False) -> Metadata:
        batch, room, heads = common_attn_metadata, self.memory, self.layer.num_heads
        check_causal(batch)
        room.replaced.look()
        if self.pack:
            self.pack.check()
        tokens, longest = batch.num_actual_tokens, batch.max_query_len
        if self.layer.flash is None or longest <= self.decode_query:
            plan = self._plan(batch, batch.num_reqs, tokens, heads, longest, room.decode, defer=self.pack is not None)
            return Metadata(tokens, plan, plan, None, room.replaced.count)
        # vLLM puts requests that decode first.
        starts = batch.query_start_loc_cpu
        decoding = int((starts.diff() > self.decode_query).int().argmax())
        rows = int(starts[decoding])
        append = self._plan(batch, batch.num_reqs, tokens, 0, longest, room.step, defer=self.pack is not None)
        attend = self._plan(batch, decoding, rows, heads, self.decode_query, room.decode) if rows else None
        step = prompts.Step.of(batch, decoding, append, room.prompts)
        return Metadata(tokens, append, attend, step, room.replaced.count)

    def _plan(self, batch, requests, tokens, heads, longest, workspace, defer=False) -> cuda.Plan:
        # Dummy runs (capture, warm-up, idle data-parallel ranks) come with lengths and with block table rows of an
        # earlier batch; only their slots, all -1, say that nothing may be written.
        return kvarn.plan(
            self.layer.layout,
            batch.block_table_tensor[:requests],
            batch.seq_lens[:requests],
            batch.query_start_loc[: requests + 1],
            tokens=tokens,
            query_heads=heads,
            max_query_len=longest,
            defer=defer,
            slots=batch.slot_mapping,
            workspace=workspace,
        )


class Impl(KvarnLayer):
    """One layer."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.memory: memory.Memory | None = None
        self.pack: Pack | None = None
        self.pages = self._cache = None
        self._config = get_current_vllm_config()
        # None: kvarn's attention takes prompts too.
        self.flash = prompts.flash_version(self._config, self.head_size, self.sinks is not None)
        self._logits: torch.Tensor | None = None

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        if self.sinks is None:
            return
        if self._logits is None:
            self._logits = self.sinks.float()
        else:  # weights that were loaded again: graphs have the tensor's address
            self._logits.copy_(self.sinks)

    def forward(
        self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale=None, output_block_scale=None
    ) -> torch.Tensor:
        """query, output [tokens, heads, head_dim]; key, value [tokens, kv_heads, head_dim]; kv_cache uint8, 4-D."""
        if attn_metadata is None:  # a profiling run: there is no cache yet
            self.memory = self.memory or memory.reserve(self, self._config, query.device)
            return output.fill_(0)
        step, n = attn_metadata, attn_metadata.tokens
        if kv_cache is not self._cache:
            self._cache, self.pages = kv_cache, self.pages_of(kv_cache)
        pages = self.pages
        matrix, balance = self.feedback or (None, None)
        kvarn.append(
            self.layout, pages, None, None, None, key[:n], value[:n], encoder=self.encoder, plan=step.append,
            feedback=matrix, balance=balance, replaced=step.replaced,
        )  # fmt: skip
        options = {"scale": self.scale, "soft_cap": self.soft_cap, "balance": balance}
        # Prompts first. Attention that follows an append directly reads packed tiles before that append has ended,
        # unless its own plan says that the step completes some; this plan does not know of the prompts' tiles, which a
        # request that hits them in the same step reads.
        if step.prompts is not None:
            step.prompts.attend(pages, query[:n], output[:n], self.flash, sinks=self.sinks, **options)
        if step.attend is not None:
            rows = step.attend.tokens
            kvarn.attend(
                self.layout, pages, None, None, None, query[:rows], out=output[:rows], plan=step.attend,
                sinks=self._logits, **options,
            )  # fmt: skip
        if step.append.defer:
            self.pack.ran(step.append)
        return output
