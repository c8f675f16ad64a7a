"""The rivals of speed.cu on its shapes: FlashAttention 3 as vLLM calls it, in bf16 and fp8, and torch's SDPA in bf16.

    PYTHONPATH=site python bench/cuda/rivals.py [word ..]

`site` holds vLLM, or only the vllm/vllm_flash_attn of it: flash_attn_interface.py and _vllm_fa3_C.abi3.so.
Every answer is checked against float64 before it is timed. Times are those of a launch inside a CUDA graph that rotates
over several caches, as in speed_time.cuh. One JSON object a line: {rival, shape, rows, us, bytes, tbps, ..}.
FlashAttention runs with vLLM's cache layout (pages of 16 tokens, its default, and of 128), schedule made once per step
and at most 32 splits, as in its full CUDA graphs.
"""

from __future__ import annotations

import functools
import itertools
import json
import statistics
import sys
import time

import torch
from torch.nn.functional import scaled_dot_product_attention

try:
    from vllm.vllm_flash_attn.flash_attn_interface import flash_attn_varlen_func, get_scheduler_metadata
except ImportError as error:
    print(f"without FlashAttention 3: {error}", file=sys.stderr)
    flash_attn_varlen_func = None

PAGE_TOKENS = 128  # of kvarn's caches: decides the lengths
POOL_BYTES = 18 << 30


class Shape:
    """Requests of about `tokens` tokens, or log-uniform from `least`: the lengths of Shape in speed_pool.cuh."""

    def __init__(self, requests, tokens, query_heads=32, kv_heads=8, head_dim=128, least=0, rows=1):
        self.requests, self.tokens, self.least, self.rows = requests, tokens, least, rows
        self.query_heads, self.kv_heads, self.head_dim = query_heads, kv_heads, head_dim
        self.scale = head_dim**-0.5

    def __str__(self):
        least = f"{self.least}-" if self.least else ""
        return f"{self.requests}x{least}{self.tokens} {self.query_heads}/{self.kv_heads} D{self.head_dim}"

    def lengths(self) -> list[int]:
        lengths = []
        for r in range(self.requests):
            random = 0.6180339887498949 * (r + 1) % 1
            if self.least:
                length = int(self.least * (self.tokens / self.least) ** random)
            else:
                length = self.tokens - PAGE_TOKENS + 1 + int(random * (PAGE_TOKENS - 1))
            lengths.append(length + (length % PAGE_TOKENS == 0))
        return lengths


def shapes() -> list[Shape]:
    square = [(32, 8192), (32, 16384), (16, 131072), (8, 32768), (1, 131072), (1, 32768), (1, 8192), (128, 2048)]
    return (
        [Shape(*s) for s in square]
        + [Shape(32, 16384, kv_heads=4)]
        + [Shape(32, 32768, least=1024), Shape(64, 16384, least=256), Shape(256, 4096, least=128)]
        + [Shape(32, 16384, query_heads=h) for h in (8, 16, 64)]
        + [Shape(32, 16384, query_heads=h, head_dim=d) for h in (32, 64) for d in (64, 96, 256)]
        + [Shape(*s, rows=rows) for rows in (2, 3, 4, 5, 8) for s in ((32, 8192), (8, 32768))]
    )


def time_graph(launch, launches: int) -> float:
    """Microseconds of launch(i), i = 0 .. launches-1 in one CUDA graph: median of 9 replays after 3."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(launches):
            launch(i)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(13)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    us = [1e3 * a.elapsed_time(b) / launches for a, b in itertools.pairwise(events[3:])]
    time.sleep(0.06)
    return statistics.median(us)


def relative_error(out, expected) -> float:
    return float((out.double() - expected).norm() / expected.norm())


def exact(q, k, v, scale: float) -> torch.Tensor:
    """q [rows, heads, D], the last rows of the sequence k, v [L, kv_heads, D] -> float64 [rows, heads, D]."""
    rows, heads, length = q.shape[0], q.shape[1], k.shape[0]
    out = torch.empty(q.shape, dtype=torch.float64, device=q.device)
    visible = torch.arange(length, device=q.device) <= torch.arange(length - rows, length, device=q.device)[:, None]
    for head in range(heads):
        kv = head * k.shape[1] // heads
        scores = q[:, head].double() @ k[:, kv].double().T * scale
        out[:, head] = scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v[:, kv].double()
    return out


def gather(cache: torch.Tensor, pages: torch.Tensor, tokens: int) -> torch.Tensor:
    """cache [pages, page, kv_heads, D], any dtype -> the first tokens of `pages`, [tokens, kv_heads, D]."""
    indexable = cache.view(torch.int8) if cache.element_size() == 1 else cache
    return indexable[pages.long()].view(cache.dtype).flatten(0, 1)[:tokens]


def flash_attention(shape: Shape, pool: torch.Tensor, page: int):
    """(launch, layers, bytes read, error). pool: any 16-bit or fp8 values."""
    lengths = shape.lengths()
    table = torch.zeros(shape.requests, -(-max(lengths) // page), dtype=torch.int32, device="cuda")
    pages = sum(-(-length // page) for length in lengths)
    order, next_page = torch.randperm(pages, device="cuda", dtype=torch.int32), 0
    for r, length in enumerate(lengths):
        count = -(-length // page)
        table[r, :count] = order[next_page : next_page + count]
        next_page += count
    elements = pages * page * shape.kv_heads * 2 * shape.head_dim
    layers = min(64, pool.numel() // elements)
    caches = []
    for layer in range(layers):
        cache = pool[layer * elements : (layer + 1) * elements].view(pages, page, shape.kv_heads, 2 * shape.head_dim)
        caches.append(cache.split(shape.head_dim, dim=-1))
    rows = shape.requests * shape.rows
    q = torch.randn(rows, shape.query_heads, shape.head_dim, device="cuda").to(pool.dtype)
    out = torch.full(q.shape, torch.nan, dtype=torch.bfloat16, device="cuda")
    starts = torch.arange(shape.requests + 1, dtype=torch.int32, device="cuda") * shape.rows
    used = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    one = torch.ones(1, device="cuda").expand(shape.requests, shape.kv_heads)
    metadata = get_scheduler_metadata(
        batch_size=shape.requests,
        max_seqlen_q=shape.rows,
        max_seqlen_k=max(lengths),
        num_heads_q=shape.query_heads,
        num_heads_kv=shape.kv_heads,
        headdim=shape.head_dim,
        cache_seqlens=used,
        qkv_dtype=pool.dtype,
        cu_seqlens_q=starts,
        page_size=page,
        causal=True,
        num_splits=32,
    )

    def launch(i: int) -> None:
        flash_attn_varlen_func(
            q=q,
            k=caches[i % layers][0],
            v=caches[i % layers][1],
            out=out,
            cu_seqlens_q=starts,
            max_seqlen_q=shape.rows,
            seqused_k=used,
            max_seqlen_k=max(lengths),
            softmax_scale=shape.scale,
            causal=True,
            block_table=table,
            scheduler_metadata=metadata,
            fa_version=3,
            q_descale=one,
            k_descale=one,
            v_descale=one,
            num_splits=32,
        )

    launch(0)
    worst = 0.0
    for r in {0, shape.requests - 1}:
        tokens = [gather(part, table[r], lengths[r]) for part in caches[0]]
        mine = slice(r * shape.rows, (r + 1) * shape.rows)
        worst = max(worst, relative_error(out[mine], exact(q[mine], *tokens, shape.scale)))
    read = sum(lengths) * shape.kv_heads * 2 * shape.head_dim * pool.element_size()
    return launch, layers, read, worst


def sdpa(shape: Shape, pool: torch.Tensor):
    """(launch, layers, bytes read, error) on a contiguous cache of exactly `tokens` tokens."""
    side = shape.requests * shape.kv_heads * shape.tokens * shape.head_dim
    layers = min(64, pool.numel() // (2 * side))
    caches = pool[: layers * 2 * side].view(layers, 2, shape.requests, shape.kv_heads, shape.tokens, shape.head_dim)
    q = torch.randn(shape.requests, shape.query_heads, 1, shape.head_dim, device="cuda").to(pool.dtype)

    def launch(i: int) -> torch.Tensor:
        k, v = caches[i % layers]
        return scaled_dot_product_attention(q, k, v, scale=shape.scale, enable_gqa=True)

    k, v = caches[0, :, 0].transpose(1, 2)
    error = relative_error(launch(0)[0, :, 0], exact(q[0].transpose(0, 1), k, v, shape.scale)[0])
    return launch, layers, 2 * side * pool.element_size(), error


def measure(name: str, shape: Shape, tolerance: float, prepare) -> None:
    try:
        launch, layers, read, error = prepare()
    except RuntimeError as refused:
        print(f"FAILED {name} {shape} rows {shape.rows}: {refused}", file=sys.stderr)
        return
    if not error <= tolerance:
        print(f"FAILED {name} {shape} rows {shape.rows}: relative error {error}", file=sys.stderr)
        return
    launches = int(min(max(3000 / (read / 3.5e6 + 5), 8), 100))
    us = time_graph(launch, launches)
    line = {"rival": name, "shape": str(shape), "rows": shape.rows, "us": round(us, 2), "bytes": read}
    line |= {"tbps": round(read / us / 1e6, 3), "layers": layers, "relative_error": float(f"{error:.2g}")}
    print(json.dumps(line), flush=True)


def main() -> None:
    torch.manual_seed(0)
    words = sys.argv[1:]
    pool = torch.empty(POOL_BYTES // 2, dtype=torch.bfloat16, device="cuda")
    for chunk in pool.split(1 << 28):
        chunk.normal_()
    fp8 = torch.empty(POOL_BYTES // 2, dtype=torch.float8_e4m3fn, device="cuda")
    for to, chunk in zip(fp8.split(1 << 28), pool.split(1 << 28), strict=True):
        to.copy_(chunk)
    for shape in shapes():
        if not all(word in f"{shape} rows {shape.rows}" for word in words):
            continue
        if flash_attn_varlen_func is not None:
            for page, suffix in ((16, ""), (128, "_page128")):
                if page != 16 and shape.rows > 1:
                    continue
                measure(f"fa3_bf16{suffix}", shape, 1e-2, functools.partial(flash_attention, shape, pool, page))
                measure(f"fa3_fp8{suffix}", shape, 1e-1, functools.partial(flash_attention, shape, fp8, page))
        if not shape.least and shape.rows == 1:
            measure("sdpa_bf16", shape, 1e-2, functools.partial(sdpa, shape, pool))


if __name__ == "__main__":
    main()
