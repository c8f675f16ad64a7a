# SPDX-License-Identifier: Apache-2.0
"""The plan of a step, worked out on the device for all its layers."""

from __future__ import annotations

import torch

from kvarn import _launch, torch_ops  # noqa: F401  (registers torch.ops.kvarn)
from kvarn.cuda.workspace import CudaWorkspace, core_of, default_workspace
from kvarn.layout import Layout


class Plan:
    """A step that `plan` has worked out on the device: pass it to append and attend of every layer of the step."""

    __slots__ = (
        "_step", "block_table", "defer", "layout", "max_query_len", "query_heads", "query_starts", "seq_lens", "slots",
        "tokens", "window", "workspace",
    )  # fmt: skip

    def __init__(
        self, layout, block_table, seq_lens, query_starts, slots, tokens, query_heads, max_query_len, window, defer,
        workspace,
    ):  # fmt: skip
        self.layout, self.workspace, self._step = layout, workspace, None
        self.block_table, self.seq_lens, self.query_starts, self.slots = block_table, seq_lens, query_starts, slots
        self.tokens, self.query_heads, self.max_query_len, self.window = tokens, query_heads, max_query_len, window
        self.defer = defer

    def operands(self, block_table=None) -> tuple:
        """For torch.ops.kvarn: workspace to slots, which plan, append, pack and attend have alike."""
        space, layout = self.workspace, self.layout
        table = self.block_table if block_table is None else block_table
        return (
            space.tensor, list(space.limits), layout.preset, layout.head_dim, layout.kv_heads, table, self.seq_lens,
            self.query_starts, self.slots,
        )  # fmt: skip

    def step(self, block_table=None) -> tuple:
        """For _launch; with another layer's block table, if one is given."""
        if block_table is not None and block_table is not self.block_table:
            return self._make_step(block_table)
        if self._step is None:
            self._step = self._make_step(self.block_table)
        return self._step

    def _make_step(self, block_table):
        return _launch.step(
            block_table, self.seq_lens, self.query_starts, self.slots, self.tokens, self.max_query_len,
            self.workspace.tensor.device, self.defer,
        )  # fmt: skip


def plan(
    layout: Layout,
    block_table,
    seq_lens,
    query_starts,
    *,
    tokens: int,
    query_heads: int = 0,
    max_query_len: int | None = None,
    window: int = 0,
    defer: bool = False,
    slots=None,
    workspace: CudaWorkspace | None = None,
) -> Plan:
    """Works out on the device what append and attend of this step will do, once for all its layers.

    block_table    int32 [requests, width]; seq_lens int32 [requests]; query_starts int32 [requests + 1]
    tokens         rows of k, v and q: at least query_starts[requests]
    query_heads    of q; 0: append only
    max_query_len  no request has more rows in this step; None: `tokens`
    window         0 (off), or how many tokens a row sees, its own included; attend of the step uses the same
    defer          leave to kvarn.cuda.pack the tiles that no row of this step reads packed. No result depends on it
    slots          None, or int64 [tokens]: a request whose first row's slot is negative takes no part
    workspace      None: one that this module keeps for the device, the stream and the layout
    Returns the Plan. It reads the tensors when it runs, and so do append and attend: leave them until then.
    Raises TypeError and ValueError for what the host can see, RuntimeError for errors of CUDA.
    """
    core = core_of(layout)
    if workspace is None:
        workspace = default_workspace(layout, block_table, tokens)
    elif not isinstance(workspace, CudaWorkspace):
        raise TypeError(f"workspace is {type(workspace).__name__}; on CUDA it must be a kvarn.CudaWorkspace")
    elif workspace.layout != layout:
        raise ValueError(f"the workspace was made for {workspace.layout}, not for {layout}")
    longest = max(1, tokens) if max_query_len is None else max_query_len
    made = Plan(
        layout, block_table, seq_lens, query_starts, slots, tokens, query_heads, longest, window, defer, workspace
    )  # fmt: skip
    if torch.compiler.is_compiling():
        torch.ops.kvarn.plan(*made.operands(), tokens, longest, query_heads, window, defer)
    else:
        _launch.plan(core, workspace.tensor, workspace.limits, made.step(), query_heads, window)
    return made


def plan_of(given, layout, block_table, seq_lens, query_starts, rows, query_heads, window, slots, workspace) -> Plan:
    """The plan of the step: the caller's, or one made here for this call alone."""
    if given is None:
        if not isinstance(rows, torch.Tensor) or rows.dim() != 3:
            raise TypeError("k, v and q must be tensors [tokens, heads, head_dim]")
        return plan(
            layout, block_table, seq_lens, query_starts, tokens=rows.shape[0], query_heads=query_heads,
            window=window or 0, slots=slots, workspace=workspace,
        )  # fmt: skip
    if not isinstance(given, Plan):
        raise TypeError(f"plan is {type(given).__name__}; it must be what kvarn.plan returned")
    if given.layout != layout:
        raise ValueError(f"the plan was made for {given.layout}, not for {layout}")
    if workspace is not None and workspace is not given.workspace:
        raise ValueError("workspace is not the plan's; leave it out where there is a plan")
    if slots is not None and slots is not given.slots:
        raise ValueError("slots are not the plan's; leave them out where there is a plan")
    return given


def same_rows(name: str, x, made: Plan) -> None:
    if isinstance(x, torch.Tensor) and x.dim() == 3 and x.shape[0] != made.tokens:
        raise ValueError(f"{name} has {x.shape[0]} rows; the plan was made for {made.tokens}")
