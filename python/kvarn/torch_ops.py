"""torch.ops.kvarn: the CUDA verbs as custom operators, so that torch.compile and graph capture see them.

    plan, append, pack, attend, expand, rotate: as kvarn.plan and so on, which call them under torch.compile. A layout
    is (preset, head_dim, kv_heads), a workspace its tensor and its five limits. What an operator writes is in its
    schema.

Importing this module registers them once; it needs torch, but neither a GPU nor a build with CUDA.
"""

from __future__ import annotations

import torch

from kvarn import _launch

_LAYOUT = "str preset, int head_dim, int kv_heads"
_STEP = "Tensor block_table, Tensor seq_lens, Tensor query_starts, Tensor? slots"

library = torch.library.Library("kvarn", "DEF")


def _define(schema: str, nothing):
    """Registers the function below it as the operator's CUDA kernel; `nothing` is its fake."""
    name = schema.partition("(")[0]
    library.define(schema)
    torch.library.register_fake(f"kvarn::{name}", nothing, lib=library)

    def register(function):
        library.impl(name, function, "CUDA")
        return function

    return register


def _writes_only(*_, **__) -> None:
    return None


@_define(
    f"plan(Tensor(a!) workspace, int[] limits, {_LAYOUT}, {_STEP}, SymInt tokens, SymInt max_query_len, "
    "int query_heads, int window, bool defer) -> ()",
    _writes_only,
)
def plan(
    workspace, limits, preset, head_dim, kv_heads, block_table, seq_lens, query_starts, slots, tokens, max_query_len,
    query_heads, window, defer,
):  # fmt: skip
    step = _launch.step(block_table, seq_lens, query_starts, slots, tokens, max_query_len, workspace.device, defer)
    _launch.plan(_launch.core_layout(preset, head_dim, kv_heads), workspace, limits, step, query_heads, window)


@_define(
    f"append(Tensor(a!) pages, Tensor(b!) workspace, int[] limits, {_LAYOUT}, {_STEP}, SymInt max_query_len, Tensor k, "
    "Tensor v, bool defer, str encoder, Tensor? feedback, Tensor? balance, Tensor(c!)? replaced) -> ()",
    _writes_only,
)
def append(
    pages, workspace, limits, preset, head_dim, kv_heads, block_table, seq_lens, query_starts, slots, max_query_len, k,
    v, defer, encoder, feedback, balance, replaced,
):  # fmt: skip
    step = _launch.step(block_table, seq_lens, query_starts, slots, k.shape[0], max_query_len, workspace.device, defer)
    core = _launch.core_layout(preset, head_dim, kv_heads)
    _launch.append(core, workspace, limits, step, pages, k, v, encoder, feedback, balance, replaced)


@_define(
    f"pack(Tensor(a!)[] pages, Tensor(b!) workspace, int[] limits, {_LAYOUT}, {_STEP}, SymInt tokens, SymInt "
    "max_query_len, str encoder, Tensor?[] feedback) -> ()",
    _writes_only,
)
def pack(
    pages, workspace, limits, preset, head_dim, kv_heads, block_table, seq_lens, query_starts, slots, tokens,
    max_query_len, encoder, feedback,
):  # fmt: skip
    device, core = workspace.device, _launch.core_layout(preset, head_dim, kv_heads)
    step = _launch.step(block_table, seq_lens, query_starts, slots, tokens, max_query_len, device)
    _launch.pack(core, workspace, limits, step, _launch.layers(core, pages, feedback, device), encoder)


@_define(
    f"attend(Tensor pages, Tensor(b!) workspace, int[] limits, {_LAYOUT}, {_STEP}, SymInt max_query_len, Tensor q, "
    "Tensor(a!) out, float scale, float soft_cap, int window, Tensor? sinks, Tensor? balance) -> ()",
    _writes_only,
)
def attend(
    pages, workspace, limits, preset, head_dim, kv_heads, block_table, seq_lens, query_starts, slots, max_query_len, q,
    out, scale, soft_cap, window, sinks, balance,
):  # fmt: skip
    step = _launch.step(block_table, seq_lens, query_starts, slots, q.shape[0], max_query_len, workspace.device)
    core = _launch.core_layout(preset, head_dim, kv_heads)
    _launch.attend(core, workspace, limits, step, pages, q, out, scale, soft_cap, window, sinks, balance)


@_define(
    f"expand(Tensor pages, {_LAYOUT}, Tensor block_table, Tensor seq_lens, Tensor(a!) k, Tensor(b!) v) -> ()",
    _writes_only,
)
def expand(pages, preset, head_dim, kv_heads, block_table, seq_lens, k, v):
    _launch.expand(_launch.core_layout(preset, head_dim, kv_heads), pages, block_table, seq_lens, k, v)


@_define("rotate(Tensor x) -> Tensor", lambda x: x.new_empty(x.shape))
def rotate(x):
    from kvarn import cuda

    return cuda.rotate(x)
