"""From torch tensors in device memory to kvarn._core: what each argument must be, and its address, shape and strides.

Everything runs on torch's current stream of the tensors' device, and nothing here waits for it.
"""

from __future__ import annotations

import functools

import torch

from kvarn import _core

# kvarn_dtype
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


@functools.lru_cache(maxsize=256)
def core_layout(preset: str, head_dim: int, kv_heads: int):
    return _core.layout(preset, head_dim, kv_heads)


def plan(core, workspace, limits, step, query_heads: int, window: int) -> None:
    """step: what `step` below makes."""
    with on(workspace.device):
        _core.cuda_plan(core, step, query_heads, window, space(workspace, limits), queue(workspace.device))


def append(core, workspace, limits, step, pages, k, v, encoder: str, feedback, balance, replaced) -> None:
    device = workspace.device
    matrices = matrices_of(core, feedback, device)
    divisors = floats("balance", balance, [core.kv_heads, core.head_dim], device)
    count = 0 if replaced is None else want("replaced", replaced, torch.int64, None, device).data_ptr()
    if replaced is not None and replaced.numel() < 1:
        raise ValueError("replaced has no element to count in")
    k_rows, v_rows = rows("k", k, core.head_dim, device), rows("v", v, core.head_dim, device)
    memory = pool(core, pages, device), step
    with on(device):
        _core.cuda_append(
            core, *memory, k_rows, v_rows, encoder, matrices, divisors, count, space(workspace, limits), queue(device)
        )  # fmt: skip


def pack(core, workspace, limits, step, layers, encoder: str) -> None:
    """layers: what `layers` below makes."""
    with on(workspace.device):
        _core.cuda_pack(core, layers, step, encoder, space(workspace, limits), queue(workspace.device))


def layers(core, pages, feedback, device) -> list[tuple]:
    if len(pages) != len(feedback):
        raise ValueError(f"{len(pages)} layers have pages and {len(feedback)} feedback; give None for those without")
    return [
        (pool(core, p, device), matrices_of(core, b, device)) for p, b in zip(pages, feedback, strict=True)
    ]  # fmt: skip


def attend(core, workspace, limits, step, pages, q, out, scale, soft_cap, window: int, sinks, balance) -> None:
    device = workspace.device
    q_rows, out_rows = rows("q", q, core.head_dim, device), rows("out", out, core.head_dim, device)
    logits = 0 if sinks is None else vector("sinks", sinks, torch.float32, q.shape[1], device)
    factors = floats("balance", balance, [core.kv_heads, core.head_dim], device)
    memory, options = (pool(core, pages, device), step), (scale, soft_cap, window, logits, factors)
    with on(device):
        _core.cuda_attend(core, *memory, q_rows, out_rows, *options, space(workspace, limits), queue(device))


def expand(core, pages, block_table, seq_lens, k, v) -> None:
    device = pages.device
    k_rows, v_rows = rows("k", k, core.head_dim, device), rows("v", v, core.head_dim, device)
    memory = pool(core, pages, device), batch(block_table, seq_lens, None, device)
    with on(device):
        _core.cuda_expand(core, *memory, k_rows, v_rows, queue(device))


def rotate(x, out) -> None:
    head_dim, device = x.shape[2], x.device
    x_rows, out_rows = rows("x", x, head_dim, device), rows("out", out, head_dim, device)
    with on(device):
        _core.cuda_rotate(head_dim, x_rows, out_rows, queue(device))


def prefill_pages(core, workspace, limits, step, pages, tables, k, v) -> None:
    """tables: (first request, end request, block_table, seq_lens, query_starts, pages, overflow)."""
    device = workspace.device
    first, end, block_table, seq_lens, query_starts, count, overflow = tables
    if not want("block_table", block_table, torch.int32, 2, device).is_contiguous():
        raise ValueError("block_table must be contiguous")
    sequences, width = block_table.shape
    lengths = vector("seq_lens", seq_lens, torch.int32, sequences, device)
    starts = vector("query_starts", query_starts, torch.int32, sequences + 1, device)
    missing = want("overflow", overflow, torch.int32, None, device).data_ptr()
    k_rows, v_rows = rows("k", k, core.head_dim, device), rows("v", v, core.head_dim, device)
    plain = (first, end, width, sequences, block_table.data_ptr(), lengths, starts, count, missing)
    memory = pool(core, pages, device), step
    with on(device):
        _core.cuda_prefill_pages(core, *memory, plain, k_rows, v_rows, space(workspace, limits), queue(device))


def want(name: str, x, dtype, dimensions: int | None, device):
    """x, if it is a tensor on `device` of that dtype and number of axes."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} is {type(x).__name__}; it must be a tensor on {device}")
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}; it must be on {device}, as the others")
    if dtype is not None and x.dtype != dtype:
        raise TypeError(f"{name} is {x.dtype}; it must be {dtype}")
    if dimensions is not None and x.dim() != dimensions:
        raise ValueError(f"{name} has shape {list(x.shape)}; it must have {dimensions} axes")
    return x


def vector(name: str, x, dtype, length: int, device) -> int:
    want(name, x, dtype, 1, device)
    if x.shape[0] != length:
        raise ValueError(f"{name} has {x.shape[0]} elements; it must have {length}")
    if length > 1 and x.stride(0) != 1:
        raise ValueError(f"{name} must be contiguous")
    return x.data_ptr()


def matrices_of(core, feedback, device) -> int:
    return floats("feedback", feedback, [core.kv_heads, core.head_dim, core.head_dim], device)


def floats(name: str, x, shape: list[int], device) -> int:
    """0 if x is None."""
    if x is None:
        return 0
    want(name, x, torch.float32, len(shape), device)
    if list(x.shape) != shape:
        raise ValueError(f"{name} has shape {list(x.shape)}; it must have {shape}")
    if not x.is_contiguous():
        raise ValueError(f"{name} must be contiguous")
    return x.data_ptr()


def rows(name: str, x, head_dim: int, device) -> tuple:
    want(name, x, None, 3, device)
    dtype = DTYPES.get(x.dtype)
    if dtype is None:
        raise TypeError(f"{name} is {x.dtype}; it must be float32, float16 or bfloat16")
    tokens, heads, channels = x.shape
    if channels != head_dim:
        raise ValueError(f"{name} has shape {list(x.shape)}; its last axis must be head_dim = {head_dim}")
    if x.stride(2) != 1 and x.numel():
        raise ValueError(f"{name} must be contiguous along its last axis; call .contiguous()")
    return x.data_ptr(), dtype, tokens, heads, x.stride(0), x.stride(1)


def pool(core, pages, device) -> tuple:
    want("pages", pages, torch.uint8, 2, device)
    if pages.shape[1] != core.page_bytes:
        raise ValueError(f"pages has shape {list(pages.shape)}; a page of this layout has {core.page_bytes} bytes")
    if pages.stride(1) != 1:
        raise ValueError("the bytes of a page must be contiguous")
    return pages.data_ptr(), pages.shape[0], pages.stride(0)


def batch(block_table, seq_lens, query_starts, device) -> tuple:
    """query_starts None: not needed."""
    want("block_table", block_table, torch.int32, 2, device)
    requests, width = block_table.shape
    if width > 1 and block_table.stride(1) != 1:
        raise ValueError("the rows of block_table must be contiguous")
    lengths = vector("seq_lens", seq_lens, torch.int32, requests, device)
    starts = 0 if query_starts is None else vector("query_starts", query_starts, torch.int32, requests + 1, device)
    return requests, width, block_table.stride(0), block_table.data_ptr(), lengths, starts


def step(
    block_table, seq_lens, query_starts, slots, tokens: int, max_query_len: int, device, defer: bool = False
) -> tuple:  # fmt: skip
    first = 0 if slots is None else want("slots", slots, torch.int64, 1, device).data_ptr()
    if slots is not None and (slots.shape[0] < tokens or (tokens > 1 and slots.stride(0) != 1)):
        raise ValueError(f"slots has shape {list(slots.shape)}; this step needs {tokens} adjacent elements")
    return batch(block_table, seq_lens, query_starts, device), first, tokens, max_query_len, defer


def space(workspace, limits) -> tuple:
    if workspace.dtype != torch.uint8 or workspace.dim() != 1 or not workspace.is_contiguous():
        raise TypeError("workspace must be a contiguous uint8 vector")
    return workspace.data_ptr(), workspace.numel(), tuple(limits)


def queue(device) -> tuple[int, int]:
    return device.index, torch.cuda.current_stream(device).cuda_stream


def on(device):
    """The device that is current inside a with statement."""
    return torch.cuda.device(device)
