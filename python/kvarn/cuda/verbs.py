# SPDX-License-Identifier: Apache-2.0
"""What kvarn.append and its fellows do on CUDA tensors."""

from __future__ import annotations

import torch

from kvarn import _launch
from kvarn.cuda.planning import Plan, plan_of, same_rows
from kvarn.cuda.workspace import core_of


def append(
    layout, pages, block_table, seq_lens, query_starts, k, v, workspace, encoder, feedback, balance, slots, plan_,
    replaced,
) -> None:  # fmt: skip
    """kvarn.append on CUDA tensors."""
    made = plan_of(plan_, layout, block_table, seq_lens, query_starts, k, 0, 0, slots, workspace)
    if torch.compiler.is_compiling():
        operands = *made.operands(block_table), made.max_query_len
        torch.ops.kvarn.append(pages, *operands, k, v, made.defer, encoder, feedback, balance, replaced)
    else:
        same_rows("k", k, made)
        space, step = made.workspace, made.step(block_table)
        _launch.append(
            core_of(layout), space.tensor, space.limits, step, pages, k, v, encoder, feedback, balance, replaced
        )  # fmt: skip


def attend(
    layout, pages, block_table, seq_lens, query_starts, q, scale, soft_cap, out, workspace, slots, window, sinks,
    balance, plan_,
):  # fmt: skip
    """kvarn.attend on CUDA tensors."""
    heads = q.shape[1] if q.dim() == 3 else 0
    made = plan_of(plan_, layout, block_table, seq_lens, query_starts, q, heads, window, slots, workspace)
    window = made.window if window is None else window
    if window != made.window or heads != made.query_heads:
        raise ValueError(
            f"the plan was made for {made.query_heads} query heads and window {made.window}; "
            f"attend has {heads} and {window}"
        )
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if torch.compiler.is_compiling():
        operands = *made.operands(block_table), made.max_query_len
        torch.ops.kvarn.attend(pages, *operands, q, out, scale, soft_cap, window, sinks, balance)
    else:
        same_rows("q", q, made)
        space, step = made.workspace, made.step(block_table)
        _launch.attend(
            core_of(layout), space.tensor, space.limits, step, pages, q, out, scale, soft_cap, window, sinks, balance
        )  # fmt: skip
    return out


def expand(layout, pages, block_table, seq_lens, dtype, out):
    """kvarn.expand on CUDA tensors."""
    core = core_of(layout)
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
    core = core_of(plan.layout)
    count = k.shape[0] // core.page_tokens
    first, end = (0, plan.seq_lens.shape[0]) if requests is None else (requests.start, requests.stop)
    tables = (first, end, block_table, seq_lens, query_starts, count, overflow)
    space = plan.workspace
    _launch.prefill_pages(core, space.tensor, space.limits, plan.step(), pages, tables, k, v)
