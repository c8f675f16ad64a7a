"""The verbs on CUDA tensors: workspaces, the plan of a step, and what kvarn.append and its fellows do on a GPU.

Per step, for all layers that have the same layout, query heads and window:

    workspace = kvarn.CudaWorkspace(layout, tokens=8192, requests=256, query_heads=32, max_seq_len=131072)  # once
    plan = kvarn.plan(layout, block_table, seq_lens, query_starts, tokens=len(q), query_heads=32, max_query_len=1,
                      workspace=workspace)
    for layer in layers:
        kvarn.append(layout, pages[layer], block_table, seq_lens, query_starts, k, v, plan=plan)
        kvarn.attend(layout, pages[layer], block_table, seq_lens, query_starts, q, scale=scale, plan=plan, out=out)

With plan(.., defer=True) the tiles that a step completes and does not read are packed for all layers at once, which
takes a fraction of the time: kvarn.cuda.pack(plan, kvarn.cuda.Layers(layout, pages)) then ends the step.

All of it runs on torch's current stream and none of it waits for the device, so that a step can be captured into a CUDA
graph, whose replay with other lengths, tables and rows in the same tensors is right. torch.compile sees operators of
torch's own kind (kvarn.torch_ops). Tables and lengths are on the device, where nothing can be raised: a request that
makes no sense takes no part, and a page index outside the pool is taken for the nearest one inside.
"""

from __future__ import annotations

import torch

from kvarn import _core, _launch, torch_ops  # noqa: F401  (registers torch.ops.kvarn)
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
            size = _core.cuda_workspace_bytes(_core_of(layout), self.limits, index)
            self.tensor = torch.zeros(size, dtype=torch.uint8, device=f"cuda:{index}")

    def __repr__(self) -> str:
        return f"CudaWorkspace({self.layout!r}, limits={self.limits}, {self.tensor.numel()} bytes)"


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
            self.workspace.tensor.device,
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
    core = _core_of(layout)
    if workspace is None:
        workspace = _default_workspace(layout, block_table, tokens)
    elif not isinstance(workspace, CudaWorkspace):
        raise TypeError(f"workspace is {type(workspace).__name__}; on CUDA it must be a kvarn.CudaWorkspace")
    elif workspace.layout != layout:
        raise ValueError(f"the workspace was made for {workspace.layout}, not for {layout}")
    longest = max(1, tokens) if max_query_len is None else max_query_len
    made = Plan(
        layout, block_table, seq_lens, query_starts, slots, tokens, query_heads, longest, window, defer, workspace
    )  # fmt: skip
    if torch.compiler.is_compiling():
        torch.ops.kvarn.plan(
            workspace.tensor, list(workspace.limits), layout.preset, layout.head_dim, layout.kv_heads, block_table,
            seq_lens, query_starts, slots, tokens, longest, query_heads, window, defer,
        )  # fmt: skip
    else:
        _launch.plan(core, workspace.tensor, workspace.limits, made.step(), query_heads, window, defer)
    return made


def append(
    layout, pages, block_table, seq_lens, query_starts, k, v, workspace, encoder, feedback, balance, slots, plan_,
    replaced,
) -> None:  # fmt: skip
    """kvarn.append on CUDA tensors."""
    made = _plan_of(plan_, layout, block_table, seq_lens, query_starts, k, 0, 0, slots, workspace)
    space, table = made.workspace, made.block_table if block_table is None else block_table
    if torch.compiler.is_compiling():
        torch.ops.kvarn.append(
            pages, space.tensor, list(space.limits), layout.preset, layout.head_dim, layout.kv_heads, table,
            made.seq_lens, made.query_starts, made.slots, made.max_query_len, k, v, encoder, feedback, balance,
            replaced,
        )  # fmt: skip
    else:
        _same_rows("k", k, made)
        _launch.append(
            _core_of(layout), space.tensor, space.limits, made.step(table), pages, k, v, encoder, feedback, balance,
            replaced,
        )  # fmt: skip


class Layers:
    """All layers of a plan, for pack.

    pages     uint8 [num_pages, page_bytes] each, those that their appends have
    feedback  float32 [kv_heads, head_dim, head_dim] or None each, likewise; None: no layer has any
    Raises TypeError and ValueError as append does.
    """

    __slots__ = ("core", "device", "feedback", "layout", "pages")

    def __init__(self, layout: Layout, pages, feedback=None):
        self.layout, self.pages = layout, list(pages)
        self.feedback = [None] * len(self.pages) if feedback is None else list(feedback)
        self.device = self.pages[0].device if self.pages else None
        if not torch.compiler.is_compiling():  # there the operator reads the tensors
            self.core = _launch.layers(_core_of(layout), self.pages, self.feedback, self.device)


def pack(made: Plan, layers: Layers, encoder: str = "weighted") -> None:
    """Packs what the appends of a step left whose plan defers, of all its layers at once: after the last attend."""
    if not made.defer:
        raise ValueError("this plan does not defer: its appends have packed every tile; plan with defer=True")
    if made.layout != layers.layout:
        raise ValueError(f"the plan was made for {made.layout}, the layers are of {layers.layout}")
    space = made.workspace
    if layers.device not in (None, space.tensor.device):
        raise ValueError(f"the layers are on {layers.device}; the plan is on {space.tensor.device}")
    if torch.compiler.is_compiling():
        layout = made.layout
        torch.ops.kvarn.pack(
            layers.pages, space.tensor, list(space.limits), layout.preset, layout.head_dim, layout.kv_heads,
            made.block_table, made.seq_lens, made.query_starts, made.slots, made.tokens, made.max_query_len, encoder,
            layers.feedback,
        )  # fmt: skip
    else:
        _launch.pack(_core_of(made.layout), space.tensor, space.limits, made.step(), layers.core, encoder)


def attend(
    layout, pages, block_table, seq_lens, query_starts, q, scale, soft_cap, out, workspace, slots, window, sinks,
    balance, plan_,
):  # fmt: skip
    """kvarn.attend on CUDA tensors."""
    heads = q.shape[1] if q.dim() == 3 else 0
    made = _plan_of(plan_, layout, block_table, seq_lens, query_starts, q, heads, window, slots, workspace)
    window = made.window if window is None else window
    if window != made.window or heads != made.query_heads:
        raise ValueError(
            f"the plan was made for {made.query_heads} query heads and window {made.window}; "
            f"attend has {heads} and {window}"
        )
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    space, table = made.workspace, made.block_table if block_table is None else block_table
    if torch.compiler.is_compiling():
        torch.ops.kvarn.attend(
            pages, space.tensor, list(space.limits), layout.preset, layout.head_dim, layout.kv_heads, table,
            made.seq_lens, made.query_starts, made.slots, made.max_query_len, q, out, scale, soft_cap, window, sinks,
            balance,
        )  # fmt: skip
    else:
        _same_rows("q", q, made)
        _launch.attend(
            _core_of(layout), space.tensor, space.limits, made.step(table), pages, q, out, scale, soft_cap, window,
            sinks, balance,
        )  # fmt: skip
    return out


def expand(layout, pages, block_table, seq_lens, dtype, out):
    """kvarn.expand on CUDA tensors."""
    core = _core_of(layout)
    if out is None:
        if torch.compiler.is_compiling():
            raise ValueError("expand needs out=(k, v) under torch.compile: how long they must be is on the device")
        _launch.want("seq_lens", seq_lens, torch.int32, 1, pages.device)
        tokens = core.page_tokens * sum(max(0, length) // core.page_tokens for length in seq_lens.tolist())
        shape = (tokens, layout.kv_heads, layout.head_dim)
        out = tuple(torch.empty(shape, dtype=dtype or torch.float32, device=pages.device) for _ in range(2))
    k, v = out
    if torch.compiler.is_compiling():
        torch.ops.kvarn.expand(pages, layout.preset, layout.head_dim, layout.kv_heads, block_table, seq_lens, k, v)
    else:
        _launch.expand(core, pages, block_table, seq_lens, k, v)
    return k, v


def rotate(x, out=None):
    """kvarn.rotate on a CUDA tensor; out: None or where to write, which may be x."""
    if torch.compiler.is_compiling():
        return torch.ops.kvarn.rotate(x)
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    three = (-1, 1, x.shape[-1]) if x.shape[-1] else (0, 1, 0)
    _launch.rotate(x.reshape(three), out.view(three))
    return out


def prefill_pages(
    plan: Plan, pages, block_table, seq_lens, query_starts, k, v, overflow, requests: range | None = None
) -> None:
    """Prefill on a 16-bit attention kernel: every query tile of the step becomes a sequence of its own.

    After append of the same step and layer. Everything on the device, all but `plan` and `pages` written:
    block_table   int32 [sequences, width], sequences at least tokens // page_tokens + 2 * requests
    seq_lens      int32 [sequences]; query_starts int32 [sequences + 1]: rows of q, the last value repeats
    k, v          float16 or bfloat16 [count * page_tokens, kv_heads, head_dim], in the rotated basis
    overflow      int32 [1]: pages that k and v lacked
    requests      those that take part; None: all of the step
    """
    core = _core_of(plan.layout)
    count = k.shape[0] // core.page_tokens
    first, end = (0, plan.seq_lens.shape[0]) if requests is None else (requests.start, requests.stop)
    tables = (first, end, block_table, seq_lens, query_starts, count, overflow)
    space = plan.workspace
    _launch.prefill_pages(core, space.tensor, space.limits, plan.step(), pages, tables, k, v)


def _core_of(layout: Layout):
    if not isinstance(layout, Layout):
        raise TypeError(f"layout is {type(layout).__name__}; it must be a kvarn.Layout")
    return layout._core


def _plan_of(given, layout, block_table, seq_lens, query_starts, rows, query_heads, window, slots, workspace) -> Plan:
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


def _same_rows(name: str, x, made: Plan) -> None:
    if isinstance(x, torch.Tensor) and x.dim() == 3 and x.shape[0] != made.tokens:
        raise ValueError(f"{name} has {x.shape[0]} rows; the plan was made for {made.tokens}")


_workspaces: dict = {}


def _default_workspace(layout: Layout, block_table, tokens: int) -> CudaWorkspace:
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
