# SPDX-License-Identifier: Apache-2.0
"""Device memory for steps: a caller's, and what kvarn keeps for calls without a plan."""

from __future__ import annotations

import torch

from kvarn import _core, _launch
from kvarn.layout import Layout

MOST_GROUP = 16  # query heads per KV head
MOST_LENGTH = 1 << 30


class CudaWorkspace:
    """Device memory for steps of at most `tokens` rows in at most `requests` requests of up to `max_seq_len` tokens.

    query_heads  0: for append and expand only
    device       of the tensors that it will be used with; None: the current one
    ctas         the grid of attention; 0: one per multiprocessor. No result depends on it
    tensor       the memory, uint8, zeroed once. One serves all layers, on one stream at a time
    Raises ValueError for limits out of range, RuntimeError if CUDA cannot be used.
    """

    __slots__ = ("layout", "limits", "tensor")

    def __init__(
        self, layout: Layout, tokens: int, requests: int, query_heads: int, max_seq_len: int, device=None, ctas: int = 0
    ):
        self.layout = layout
        self.limits = (tokens, requests, query_heads, max_seq_len, ctas)
        device = torch.device("cuda" if device is None else device)
        if device.type != "cuda":
            raise ValueError(f"a CudaWorkspace lies on a CUDA device, not on {device}")
        if missing := _core.cuda_missing():
            raise RuntimeError(missing)
        index = torch.cuda.current_device() if device.index is None else device.index
        with _launch.on(index):
            size = _core.cuda_workspace_bytes(core_of(layout), self.limits, index)
            self.tensor = torch.zeros(size, dtype=torch.uint8, device=f"cuda:{index}")

    def __repr__(self) -> str:
        return f"CudaWorkspace({self.layout!r}, limits={self.limits}, {self.tensor.numel()} bytes)"


def core_of(layout: Layout):
    if not isinstance(layout, Layout):
        raise TypeError(f"layout is {type(layout).__name__}; it must be a kvarn.Layout")
    return layout._core


_workspaces: dict = {}


def default_workspace(layout: Layout, block_table, tokens: int) -> CudaWorkspace:
    """This module's workspace for (device, stream, layout), grown as needed. Its limits depend on the step's shapes
    alone, so that append and attend of one step, each with a plan of its own, find the raw tiles in the same place."""
    device = getattr(block_table, "device", None)
    if not isinstance(block_table, torch.Tensor) or device.type != "cuda" or block_table.dim() != 2:
        raise TypeError("block_table must be an int32 tensor [requests, width] on the device of the others")
    requests, width = block_table.shape
    needed = (_power(tokens), _power(requests), min(MOST_LENGTH, _power(width * layout._core.page_tokens)))
    key = (device, torch.cuda.current_stream(device).cuda_stream, layout)
    found = _workspaces.get(key)
    if found is None or any(have < need for have, need in zip(_sizes(found), needed, strict=True)):
        have = needed if found is None else _sizes(found)
        tokens, requests, longest = (max(pair) for pair in zip(have, needed, strict=True))
        heads = MOST_GROUP * layout.kv_heads
        found = _workspaces[key] = CudaWorkspace(layout, tokens, requests, heads, longest, device)
    return found


def _sizes(workspace: CudaWorkspace) -> tuple[int, int, int]:
    tokens, requests, _, longest, _ = workspace.limits
    return tokens, requests, longest


def _power(n: int) -> int:
    return 1 << max(4, (n - 1).bit_length())
