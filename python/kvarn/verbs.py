"""append, attend, expand, rotate: the verbs of the specification on numpy arrays and torch tensors, CPU and CUDA."""

from __future__ import annotations

import threading

import numpy as np

from kvarn import _core
from kvarn.layout import Layout

# Of append: the library's own, which is the default, and the published algorithm.
ENCODERS = ("weighted", "varnorm")

_own = threading.local()


def workspace_bytes(
    layout: Layout, tokens: int, requests: int, query_heads: int, max_seq_len: int, threads: int | None = None
) -> int:
    """Bytes of workspace for steps of at most `tokens` new tokens in at most `requests` requests of up to
    `max_seq_len` tokens, with `query_heads` query heads and `threads` threads (None: OpenMP's maximum)."""
    return _core.workspace_bytes(_layout(layout), tokens, requests, query_heads, max_seq_len, threads)


def append(
    layout: Layout,
    pages,
    block_table,
    seq_lens,
    query_starts,
    k,
    v,
    workspace=None,
    encoder: str = "weighted",
    target: str | None = None,
    *,
    feedback=None,
    balance=None,
    slots=None,
    plan=None,
    replaced=None,
) -> int | None:
    """Rotates the step's k and v, writes them raw, and packs every tile that completed.

    pages      uint8 [num_pages, page_bytes], rows 16-byte aligned; mutated
    k, v       [tokens, kv_heads, head_dim]
    workspace  uint8 [bytes], 64-byte aligned, see workspace_bytes; None: one that this module keeps per thread.
               attend of the same step and layer must get the same one
    encoder    "weighted" (default) or "varnorm" (the published algorithm)
    target     None, or a name of kvarn.targets()
    feedback   None, or float32 [kv_heads, head_dim, head_dim] from kvarn.feedback, on the device of pages: K is rounded
               for the queries that will read it ("weighted" only). Records depend on it: give a cache the same one for
               its whole life
    balance    None, or float32 [kv_heads, head_dim], powers of two, on the device of pages: k is divided by it, and
               attend of these pages multiplies q by it, which is exact and changes no product. Channels that deviate
               alike are rounded in smaller steps (docs/encoder-study.md); kvarn.energy finds it
    Returns how many elements of k and v were replaced: NaN by 0, magnitudes above 65504 by 65504.

    On CUDA tensors, on torch's current stream and without waiting for it; returns None:
    plan       of this step, see kvarn.plan; None: one is made for this call. block_table, seq_lens and query_starts may
               be None where there is one
    workspace  a kvarn.CudaWorkspace, where there is no plan; None: one that kvarn keeps
    slots      where there is no plan, see kvarn.plan
    replaced   None, or an int64 tensor whose first element the number of replaced elements is added to
    """
    if cuda := _cuda(pages):
        _no_target(target)
        return cuda.append(
            layout, pages, block_table, seq_lens, query_starts, k, v, workspace, encoder, feedback, balance, slots,
            plan, replaced,
        )  # fmt: skip
    _cuda_only(slots=slots, plan=plan, replaced=replaced)
    core = _layout(layout)
    if workspace is None:
        workspace = _default_workspace(core, block_table, seq_lens, k, 0)
    return _core.append(
        core, pages, block_table, seq_lens, query_starts, k, v, workspace, encoder, target, feedback, balance
    )


def attend(
    layout: Layout,
    pages,
    block_table,
    seq_lens,
    query_starts,
    q,
    *,
    scale: float,
    soft_cap: float = 0.0,
    out=None,
    workspace=None,
    target: str | None = None,
    balance=None,
    slots=None,
    window: int | None = None,
    sinks=None,
    plan=None,
):
    """Causal attention of the step's query rows over each request's tokens; all appends of the layer come before it.

    q      [tokens, query_heads, head_dim]; query head h reads KV head h // (query_heads // kv_heads), ratio 1 .. 64
    scale  of the scores;  soft_cap: 0 (off), or scores become soft_cap * tanh(score / soft_cap)
    out    like q, written in place; None: a new array of q's kind and dtype
    balance  None, or what append of these pages had
    Returns out. A row's bits depend on its own request's tokens only. A query with NaN or infinity makes its row NaN.

    On CUDA tensors, on torch's current stream and without waiting for it (ratio 1 .. 16; slots, workspace and plan as
    in append; a plan must be for these query heads and this window):
    window  0 (off), or how many tokens a row sees, its own included; None: the plan's, or 0
    sinks   None, or float32 [query_heads]: a logit per head that takes probability and has no value
    """
    if cuda := _cuda(pages):
        _no_target(target)
        if not hasattr(q, "dim"):
            raise TypeError(f"q is {type(q).__name__}; it must be a tensor on the device of pages")
        tables = block_table, seq_lens, query_starts
        return cuda.attend(
            layout, pages, *tables, q, scale, soft_cap, out, workspace, slots, window, sinks, balance, plan
        )  # fmt: skip
    _cuda_only(slots=slots, sinks=sinks, plan=plan, window=window or None)
    core = _layout(layout)
    if out is None:
        out = _empty_like(q)
    if workspace is None:
        workspace = _default_workspace(core, block_table, seq_lens, q, q.shape[1] if len(q.shape) == 3 else 0)
    _core.attend(core, pages, block_table, seq_lens, query_starts, q, out, scale, soft_cap, workspace, target, balance)
    return out


def expand(layout: Layout, pages, block_table, seq_lens, dtype=None, target: str | None = None, *, out=None):
    """The complete tiles of each request, dequantized in the rotated basis, one request after the other. Keys are still
    divided by the balance that append had.

    dtype  of the results: a numpy or torch dtype as `pages` is an array or a tensor; None: float32
    Returns (k, v), each [tokens, kv_heads, head_dim], tokens = sum of page_tokens * (seq_len // page_tokens).

    On CUDA tensors the lengths are read to the host, which waits for the device, unless out is given:
    out    (k, v), [tokens or more, kv_heads, head_dim], float32, float16 or bfloat16: written and returned. Tiles that
           they have no room for are left out, what is beyond the last tile is left as it is
    """
    if cuda := _cuda(pages):
        _no_target(target)
        return cuda.expand(layout, pages, block_table, seq_lens, dtype, out)
    _cuda_only(out=out)
    core = _layout(layout)
    lengths, width = _lengths(seq_lens), _shape("block_table", block_table)[-1]
    tiles = [max(0, length) // core.page_tokens for length in lengths]
    if max(tiles, default=0) > width:
        raise ValueError(f"seq_lens of {max(lengths)} tokens need {max(tiles)} pages; block_table has {width} columns")
    tokens = sum(tiles) * core.page_tokens
    shape = (tokens, core.kv_heads, core.head_dim)
    if isinstance(pages, np.ndarray):
        k, v = np.empty(shape, dtype or np.float32), np.empty(shape, dtype or np.float32)
    else:
        import torch

        k, v = torch.empty(shape, dtype=dtype or torch.float32), torch.empty(shape, dtype=dtype or torch.float32)
    workspace = _own_workspace(_core.workspace_bytes(core, 0, 0, 0, 0, None))
    _core.expand(core, pages, block_table, seq_lens, k, v, workspace, target)
    return k, v


def rotate(x, target: str | None = None):
    """The orthonormal Hadamard rotation of the last axis (its own inverse), in x's dtype; x is not changed."""
    if (cuda := _cuda(x)) and x.ndim:
        _no_target(target)
        return cuda.rotate(x)
    out = _empty_like(x)
    if x.ndim == 0:
        raise ValueError("x has no axis to rotate; its last axis must be head_dim: 64, 80, 96, 128 or 256")
    three = (-1, 1, x.shape[-1]) if x.shape[-1] else (0, 1, 0)
    _core.rotate(x.reshape(three), out.reshape(three), target)
    return out


def _cuda(x):
    """kvarn.cuda if x is a CUDA tensor, else None."""
    if getattr(x, "is_cuda", False) is not True:
        return None
    from kvarn import cuda

    return cuda


def _no_target(target: str | None) -> None:
    if target is not None:
        raise ValueError(f"target {target!r} is for arrays and tensors in this machine's memory; leave it out on CUDA")


def _cuda_only(**options) -> None:
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{name} is for CUDA tensors only, and pages is not one")


def _layout(layout: Layout):
    if not isinstance(layout, Layout):
        raise TypeError(f"layout is {type(layout).__name__}; it must be a kvarn.Layout")
    return layout._core


def _empty_like(x):
    if isinstance(x, np.ndarray):
        return np.empty(x.shape, x.dtype)
    try:
        import torch
    except ImportError:
        torch = None
    if torch is None or not isinstance(x, torch.Tensor):
        raise TypeError(f"expected a numpy array or a torch tensor, got {type(x).__name__}")
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _shape(name: str, x) -> tuple[int, ...]:
    shape = getattr(x, "shape", None)
    if not shape:
        raise TypeError(f"{name} must be an array or a tensor with axes, got {type(x).__name__}")
    return tuple(shape)


def _lengths(seq_lens) -> list[int]:
    if len(_shape("seq_lens", seq_lens)) != 1:
        raise ValueError("seq_lens must have one axis")
    try:
        return [int(length) for length in seq_lens.tolist()]
    except (AttributeError, NotImplementedError, RuntimeError, TypeError) as error:
        raise TypeError(f"seq_lens must be an int32 array in this machine's memory: {error}") from error


def _default_workspace(core, block_table, seq_lens, rows, query_heads: int):
    lengths, tokens = _lengths(seq_lens), _shape("k, v and q", rows)[0]
    # No longer than the table allows: the library refuses what is longer, after this buffer is made.
    longest = min(max(lengths, default=0), _shape("block_table", block_table)[-1] * core.page_tokens)
    return _own_workspace(_core.workspace_bytes(core, tokens, len(lengths), query_heads, max(0, longest), None))


def _own_workspace(size: int):
    """This thread's buffer, grown as needed. Growing keeps what append left for attend."""
    buffer = getattr(_own, "buffer", None)
    if buffer is None or buffer.size < size:
        memory = np.zeros(size + 63, np.uint8)
        start = -memory.ctypes.data % 64
        grown = memory[start : start + size]
        if buffer is not None:
            grown[: buffer.size] = buffer
        _own.buffer = buffer = grown
    return buffer
