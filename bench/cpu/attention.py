"""One decode row per request: kvarn's attend beside vLLM's own CPU attention operator and torch's, in one run.

    OMP_NUM_THREADS=2 python bench/cpu/attention.py [--presets kvarn_k4v2_g128 ...] [--out file]

Every answer is checked against float64 attention over the same (dequantized, or bfloat16) cache before it is timed.
Timings interleave the contenders round by round, so that a ratio comes from the same minutes; medians are reported.
Prints and appends one JSON object a line: shape, microseconds, bytes read, byte products, percent of the measured read
bandwidth, and each rival's microseconds.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import time
from pathlib import Path

import kvarn
import numpy as np
import torch

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
SHAPES = [(1, 8192), (4, 8192), (8, 2048), (1, 32768)]
SCALE = HEAD_DIM**-0.5


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    return float((out.double() - expected).norm() / expected.norm())


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """q [B, HEADS, D]; k, v [B, L, KV_HEADS, D] -> float64 [B, HEADS, D], one request and KV head at a time."""
    group, out = HEADS // KV_HEADS, torch.empty(q.shape, dtype=torch.float64)
    for b in range(len(q)):
        for h in range(KV_HEADS):
            rows = slice(h * group, (h + 1) * group)
            weights = (q[b, rows].double() @ k[b, :, h].double().T * SCALE).softmax(-1)
            out[b, rows] = weights @ v[b, :, h].double()
    return out


def kvarn_call(preset: str, requests: int, tokens: int, q: torch.Tensor):
    """(function, bytes of the records it reads). The pool is filled by append, its pages in random order."""
    layout = kvarn.Layout(preset, HEAD_DIM, KV_HEADS)
    generator = np.random.default_rng(1)
    per_request = tokens // layout.page_tokens + layout.pages_ahead
    pages = torch.zeros(requests * per_request, layout.page_bytes, dtype=torch.uint8)
    table = torch.from_numpy(
        generator.permutation(requests * per_request).astype(np.int32).reshape(requests, per_request)
    )
    chunk = 2048
    for request in range(requests):
        for start in range(0, tokens, chunk):
            k, v = (torch.randn(chunk, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16) for _ in range(2))
            length = torch.tensor([start + chunk], dtype=torch.int32)
            starts = torch.tensor([0, chunk], dtype=torch.int32)
            kvarn.append(layout, pages, table[request : request + 1], length, starts, k, v)
    lengths = torch.full((requests,), tokens, dtype=torch.int32)
    starts = torch.arange(requests + 1, dtype=torch.int32)
    out = torch.empty_like(q)
    size = kvarn.workspace_bytes(layout, requests, requests, HEADS, tokens)
    workspace = torch.empty(size + 63, dtype=torch.uint8)
    workspace = workspace[-workspace.data_ptr() % 64 :][:size]
    # The last token of each request stands in its packed tile's raw room too; attend reads its own tile raw.
    run = lambda: kvarn.attend(  # noqa: E731
        layout, pages, table, lengths, starts, q, scale=SCALE, out=out, workspace=workspace
    )
    k, v = (
        kvarn.rotate(x).view(requests, tokens, KV_HEADS, HEAD_DIM) for x in kvarn.expand(layout, pages, table, lengths)
    )
    own = layout.page_tokens * ((tokens - 1) // layout.page_tokens)
    raw_k, raw_v = raw_tiles(layout, pages, table, own, tokens)
    k[:, own:], v[:, own:] = kvarn.rotate(raw_k), kvarn.rotate(raw_v)
    run()
    error = relative_error(out, exact(q, k, v))
    assert error < 3e-3, f"{preset}: relative error {error}"  # bfloat16 output: 2e-3
    read = requests * KV_HEADS * (own // layout.page_tokens * layout.record_bytes + (tokens - own) * 4 * HEAD_DIM)
    return run, read, error


def raw_tiles(layout, pages, table, start, end):
    """The raw tokens start .. end-1 of every request, float32 [requests, tokens, KV_HEADS, HEAD_DIM], by the formula of
    docs/specification.md section 3."""
    n, m, g = layout.raw_tokens_per_page, layout.pages_ahead, layout.page_tokens
    regions = pages.view(len(pages), KV_HEADS, layout.record_bytes)[:, :, : n * 4 * HEAD_DIM]
    raw = regions.view(torch.float16).view(len(pages), KV_HEADS, 2, n, HEAD_DIM)
    out = torch.empty(2, len(table), end - start, KV_HEADS, HEAD_DIM)
    for position in range(start, end):
        tile, offset = divmod(position, g)
        page, slot = (tile + m, offset) if offset < n else (tile + offset // n, offset % n)
        rows = raw[table[:, page].long(), :, :, slot]  # [requests, KV_HEADS, 2, HEAD_DIM]
        out[0, :, position - start], out[1, :, position - start] = rows[:, :, 0], rows[:, :, 1]
    return out[0], out[1]


def vllm_call(requests: int, tokens: int, q: torch.Tensor):
    """vLLM's CPU attention operator on a bfloat16 cache of 128-token blocks, as its CPU_ATTN backend calls it."""
    import vllm._C  # noqa: F401  (loads the operators)
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    isa, block = _get_attn_isa(torch.bfloat16, 128, HEAD_DIM), 128
    per_request = tokens // block
    cache = torch.zeros(requests * per_request, KV_HEADS, 2 * block, HEAD_DIM, dtype=torch.bfloat16)
    k_cache, v_cache = cache.chunk(2, dim=2)
    table = torch.randperm(requests * per_request).int().view(requests, per_request)
    k, v = (torch.randn(requests, tokens, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16) for _ in range(2))
    slots = (table.long()[:, :, None] * block + torch.arange(block)).view(-1)
    ops.cpu_attn_reshape_and_cache(
        k.view(-1, KV_HEADS, HEAD_DIM), v.view(-1, KV_HEADS, HEAD_DIM), k_cache, v_cache, slots, isa
    )
    lengths = torch.full((requests,), tokens, dtype=torch.int32)
    starts = torch.arange(requests + 1, dtype=torch.int32)
    plan = ops.cpu_attn_get_scheduler_metadata(
        requests, HEADS, KV_HEADS, HEAD_DIM, lengths, torch.bfloat16, starts, True, -1, isa, True
    )
    out = torch.empty_like(q)
    run = lambda: ops.cpu_attention_with_kv_cache(  # noqa: E731
        q, k_cache, v_cache, out, starts, lengths, SCALE, True, None, -1, table, 0.0, plan, None
    )
    run()
    error = relative_error(out, exact(q, k, v))
    assert error < 1e-2, f"vLLM's operator: relative error {error}"
    return run, k, v


def sdpa_call(q, k, v):
    queries, keys, values = q.unsqueeze(2), k.transpose(1, 2), v.transpose(1, 2)
    return lambda: torch.nn.functional.scaled_dot_product_attention(queries, keys, values, enable_gqa=True, scale=SCALE)


def read_bandwidth() -> float:
    """Bytes per second of summing 512 MiB with all threads: the ceiling of anything that reads a cache once."""
    data = torch.ones(1 << 26, dtype=torch.int64)
    return max(data.nbytes / seconds(lambda: data.sum()) for _ in range(8))


def seconds(run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", nargs="+", default=kvarn.presets())
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "cpu-attention.jsonl")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    bandwidth = read_bandwidth()
    for requests, tokens in SHAPES:
        q = torch.randn(requests, HEADS, HEAD_DIM, dtype=torch.bfloat16)
        contenders, facts = {}, {}
        contenders["vllm_bf16"], k, v = vllm_call(requests, tokens, q)
        contenders["sdpa_bf16"] = sdpa_call(q, k, v)
        for preset in arguments.presets:
            contenders[preset], *facts[preset] = kvarn_call(preset, requests, tokens, q)
        times = {name: [] for name in contenders}
        for i in range(arguments.rounds):
            for name, run in contenders.items():
                if name != "sdpa_bf16" or i < 5:
                    times[name].append(seconds(run))
        us = {name: 1e6 * float(np.median(values)) for name, values in times.items()}
        rivals = {name: round(us[name], 1) for name in ("vllm_bf16", "sdpa_bf16")}
        for preset, (read, error) in facts.items():
            line = {
                "date": datetime.date.today().isoformat(),
                "commit": commit,
                "machine": platform.processor() or platform.machine(),
                "target": kvarn.target(),
                "threads": torch.get_num_threads(),
                "bench": "attend",
                "preset": preset,
                "shape": f"{requests}x{tokens} {HEADS}/{KV_HEADS} D{HEAD_DIM}",
                "us": round(us[preset], 1),
                "bytes": read,
                "byte_products": 2 * 2 * requests * tokens * HEADS * HEAD_DIM,
                "read_gbps": round(read / us[preset] / 1e3, 2),
                "percent_of_read": round(100 * read / us[preset] * 1e6 / bandwidth, 1),
                "ceiling_gbps": round(bandwidth / 1e9, 1),
                "relative_error": float(f"{error:.2g}"),
                "rivals": rivals,
                "times_vllm": round(us["vllm_bf16"] / us[preset], 2),
            }
            print(json.dumps(line), flush=True)
            with arguments.out.open("a") as out:
                out.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
