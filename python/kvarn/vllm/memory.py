# SPDX-License-Identifier: Apache-2.0
"""Device memory that the layers of a group share from step to step.

It is made in vLLM's profiling run, by the first layer that asks, so that vLLM counts it; the builders, which come
later and more than once, find it again. Without a profiling run the first builder makes it. It goes with the layers.
"""

from typing import NamedTuple
from weakref import WeakValueDictionary

import torch

import kvarn

from .backend import warn_replaced


class Memory:
    """Of layers with one layout and one number of query heads.

    decode   kvarn.CudaWorkspace of steps, or of the part of a step, that kvarn's attention computes
    step     of whole steps that contain prompts; decode itself where kvarn's attention computes those too
    prompts  Prompts, or None
    most     what it was made for
    """

    def __init__(self, layout, query_heads: int, most: "Most", dtype, device, prompts: bool):
        self.most = most
        tokens, _, rows, requests, longest = most
        if prompts:
            self.decode = kvarn.CudaWorkspace(layout, rows, requests, query_heads, longest, device)
            self.step = kvarn.CudaWorkspace(layout, tokens, requests, 0, longest, device)
            self.prompts = Prompts.shared(layout, most, dtype, device)
        else:
            self.decode = self.step = kvarn.CudaWorkspace(layout, tokens, requests, query_heads, longest, device)
            self.prompts = None
        self.replaced = Replaced(device)


class Most(NamedTuple):
    """What no step of an engine exceeds."""

    tokens: int
    query: int  # rows of a request that decodes: the verification of drafts, and a draft model takes one row more
    decode_rows: int  # of all requests that decode, padded as CUDA graphs are
    requests: int
    length: int

    @classmethod
    def of(cls, config) -> "Most":
        scheduler, drafts = config.scheduler_config, config.speculative_config
        tokens, requests = scheduler.max_num_batched_tokens, scheduler.max_num_seqs
        query = 2 + drafts.num_speculative_tokens if drafts else 1
        rows = max(requests * query, config.compilation_config.max_cudagraph_capture_size or 0)
        return cls(tokens, query, min(tokens, rows), requests, config.model_config.max_model_len)


class Prompts:
    """Room for the 16-bit pages of prompts: of the longest request alone, or of several that fit together.

    What lies in it is one layer's, so that layers of all presets share it.

    k, v           [pages * page_tokens, kv_heads, head_dim], in the rotated basis
    block_table    int32 [sequences, width], seq_lens, query_starts: of the query tiles, see kvarn.cuda.prefill_pages
    """

    def __init__(self, layout, tokens, requests, longest, dtype, device):
        tile = layout.page_tokens
        self.pages = -(-longest // tile) + -(-tokens // tile) + 2
        shape = (self.pages * tile, layout.kv_heads, layout.head_dim)
        self.k, self.v = (torch.zeros(shape, dtype=dtype, device=device) for _ in "kv")
        sequences = tokens // tile + 2 * requests
        integers = {"dtype": torch.int32, "device": device}
        self.block_table = torch.zeros(sequences, longest // tile + 2, **integers)
        self.seq_lens = torch.zeros(sequences, **integers)
        self.query_starts = torch.zeros(sequences + 1, **integers)
        self.overflow = torch.zeros(1, **integers)

    @classmethod
    def shared(cls, layout, most: Most, dtype, device) -> "Prompts":
        """The one there is for layers of this shape, else a new one."""
        key = layout.page_tokens, layout.kv_heads, layout.head_dim, most, dtype, str(device)
        if (room := _prompts.get(key)) is None:
            _prompts[key] = room = cls(layout, most.tokens, most.requests, most.length, dtype, device)
        return room


class Replaced:
    """How many keys and values were not finite or too large: counted on the device, looked at without waiting."""

    EVERY = 256  # steps

    def __init__(self, device):
        self.count = torch.zeros(1, dtype=torch.int64, device=device)
        self._seen = torch.zeros(1, dtype=torch.int64, pin_memory=True)
        self._steps = 0

    def look(self) -> None:
        """Once a step; warns once. What it sees is the count of some steps ago."""
        if self._steps % self.EVERY == 0:
            if found := int(self._seen):
                warn_replaced(found)
            self._seen.copy_(self.count, non_blocking=True)
        self._steps += 1


_made: WeakValueDictionary[tuple, Memory] = WeakValueDictionary()
_prompts: WeakValueDictionary[tuple, Prompts] = WeakValueDictionary()


def reserve(layer, config, device, group: str | None = None) -> Memory:
    """The memory of layers like `layer` (a gpu.Impl) in the group that has the layer `group`; None: not known yet."""
    most, prompts = Most.of(config), layer.flash is not None
    kind = (layer.layout, layer.num_heads, most, str(device), prompts)
    memory = _made.get((kind, group)) or (_made.pop((kind, None), None) if group else None)
    if memory is None:
        memory = Memory(layer.layout, layer.num_heads, most, config.model_config.dtype, device, prompts)
    _made[kind, group] = memory
    return memory
