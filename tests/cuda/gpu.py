# SPDX-License-Identifier: Apache-2.0
"""What the GPU tests share: the shapes of this build, a pool with requests in it, and attention in float64."""

import os
import re
from dataclasses import dataclass, field

import kvarn
import numpy as np
import torch
from cases import disjoint_tables, pages_needed
from kvarn import _core, reference
from kvarn.reference.arithmetic import hadamard

DEVICE = torch.device("cuda", 0)
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 6e-3, torch.float32: 2e-3}


def built_shapes(limit: int | None = None) -> list[tuple[str, int]]:
    """(preset, head_dim) of every shape that has kernels; KVARN_TEST_SHAPES=n takes n of them, spread out."""
    names = [re.fullmatch(r"(k\dv\d_g\d+)_d(\d+)", name) for name in _core.cuda_shapes()]
    found = [(f"kvarn_{name[1]}", int(name[2])) for name in names]
    limit = limit or int(os.environ.get("KVARN_TEST_SHAPES", "0")) or len(found)
    return found[:: -(-len(found) // limit) or 1] if found else []


SHAPES = built_shapes() or [("kvarn_k4v2_g128", 128)]
FEW_SHAPES = built_shapes(6) or SHAPES
MAIN = ("kvarn_k4v2_g128", 128) if ("kvarn_k4v2_g128", 128) in SHAPES else SHAPES[0]


def ints(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def random(shape, seed: int, dtype=torch.float16, std: float = 1.0) -> torch.Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return (torch.randn(shape, generator=generator, device=DEVICE) * std).to(dtype)


def rubbish(layout, count: int, seed: int = 99) -> torch.Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randint(0, 256, (count, layout.page_bytes), generator=generator, dtype=torch.uint8, device=DEVICE)


def workspace(layout, tokens=1024, requests=32, query_heads=None, max_seq_len=1 << 18, ctas=0):
    heads = 16 * layout.kv_heads if query_heads is None else query_heads
    return kvarn.CudaWorkspace(layout, tokens, requests, heads, max_seq_len, DEVICE, ctas)


@dataclass
class Options:
    """Of attention."""

    soft_cap: float = 0.0
    window: int = 0
    sinks: torch.Tensor | None = None
    scale: float | None = None


@dataclass
class World:
    """Requests of `lengths` tokens after this step, `news` of them new; all before is in the pages already."""

    layout: kvarn.Layout
    lengths: list[int]
    news: list[int]
    group: int = 4
    dtype: torch.dtype = torch.float16
    seed: int = 1
    query_std: float = 1.0
    growing: bool = False  # keys that score higher the later they come
    tables: list = field(init=False)
    before: torch.Tensor = field(init=False)  # the pool before the step

    def __post_init__(self):
        layout, H, D = self.layout, self.layout.kv_heads, self.layout.head_dim
        self.tables, count = disjoint_tables(layout, self.lengths)
        self.k = [random((n, H, D), 2 * r + self.seed * 1000, self.dtype) for r, n in enumerate(self.lengths)]
        self.v = [random((n, H, D), 2 * r + 1 + self.seed * 1000, self.dtype) for r, n in enumerate(self.lengths)]
        if self.growing:
            for k in self.k:
                ramp = torch.linspace(0.1, 3, len(k), device=DEVICE)[:, None, None]
                k.copy_(torch.sign(k[:1].float()) * ramp + 0.1 * k.float())
        shapes = [(n, H * self.group, D) for n in self.news]
        self.q = [random(s, 77 + r + self.seed * 1000, self.dtype, self.query_std) for r, s in enumerate(shapes)]
        self.before = rubbish(layout, count)
        self.starts = [length - new for length, new in zip(self.lengths, self.news, strict=True)]
        for r, start in enumerate(self.starts):  # in chunks, so that a workspace of moderate size does
            for first in range(0, start, 16384):
                end = min(first + 16384, start)
                rows = self.k[r][first:end], self.v[r][first:end]
                step = self._tables([r]), ints([end]), ints([0, end - first])
                kvarn.append(layout, self.before, *step, *rows)

    def _tables(self, order):
        width = max(len(self.tables[r]) for r in order)
        return ints([self.tables[r] + [-7] * (width - len(self.tables[r])) for r in order])

    def step(self, order):
        """block_table, seq_lens, query_starts of the requests in `order`."""
        starts = np.cumsum([0] + [self.news[r] for r in order])
        return self._tables(order), ints([self.lengths[r] for r in order]), ints(starts.tolist())

    def run(self, order=None, options=None, space=None, max_query_len=None, pages=None, defer=False):
        """One step of the requests in `order`, on a copy of the pool, kept as .pages: {request: its rows}."""
        options, order = options or Options(), list(range(len(self.lengths))) if order is None else order
        self.pages = self.before.clone() if pages is None else pages
        step = self.step(order)
        k, v, q = (
            torch.cat([side[r][len(side[r]) - self.news[r] :] for r in order]) for side in (self.k, self.v, self.q)
        )
        space = space or workspace(self.layout, max(16, len(q)), len(order), max_seq_len=max(self.lengths))
        longest = max_query_len or max(self.news)
        plan = kvarn.plan(
            self.layout, *step, tokens=len(q), query_heads=q.shape[1], max_query_len=longest, window=options.window,
            workspace=space, defer=defer,
        )  # fmt: skip
        out = torch.full_like(q, float("nan"))
        kvarn.append(self.layout, self.pages, *step, k, v, plan=plan)
        kvarn.attend(
            self.layout, self.pages, *step, q, scale=self.scale(options), soft_cap=options.soft_cap, out=out, plan=plan,
            sinks=options.sinks,
        )  # fmt: skip
        if defer:
            kvarn.cuda.pack(plan, kvarn.cuda.Layers(self.layout, [self.pages]))
        bounds = step[2].tolist()
        return {r: out[bounds[i] : bounds[i + 1]] for i, r in enumerate(order)}

    def scale(self, options) -> float:
        return self.layout.head_dim**-0.5 if options.scale is None else options.scale

    def exact(self, request: int, options=None) -> torch.Tensor:
        """The request's rows in float64, from its expanded tiles in .pages and its raw own tiles."""
        options, G = options or Options(), self.layout.page_tokens
        length, start = self.lengths[request], self.starts[request]
        table, lengths = self._tables([request]), ints([length])
        packed = [x.double() for x in kvarn.expand(self.layout, self.pages, table, lengths)]
        base = start // G * G
        raw = [_clean(side[request][base:]) for side in (self.k, self.v)]
        out, position = [], start
        while position < length:
            tile, end = position // G, min((position // G + 1) * G, length)
            k, v = (
                torch.cat([side[: tile * G], own[tile * G - base : end - base]])
                for side, own in zip(packed, raw, strict=True)
            )
            q = self.q[request][position - start : end - start]
            out.append(attention(q, k, v, position, self.scale(options), options))
            position = end
        return torch.cat(out)


def _clean(x: torch.Tensor) -> torch.Tensor:
    """Raw vectors as the pages hold them, in float64."""
    halves, _ = reference._clean_rotated(x.float().cpu().numpy())
    return torch.from_numpy(halves.astype(np.float64)).to(DEVICE)


def attention(q, k, v, position: int, scale: float, options: Options) -> torch.Tensor:
    """float64 [rows, query heads, D]; k, v [tokens, KV heads, D] rotated; row i is at position + i."""
    matrix = torch.from_numpy(hadamard(np.eye(q.shape[-1]))).to(DEVICE)
    group = q.shape[1] // k.shape[1]
    out = torch.empty(q.shape, dtype=torch.float64, device=DEVICE)
    rows = torch.arange(position, position + len(q), device=DEVICE)[:, None]
    tokens = torch.arange(len(k), device=DEVICE)[None]
    hidden = tokens > rows
    if options.window:
        hidden |= tokens <= rows - options.window
    for head in range(q.shape[1]):
        y = (q[:, head].double() @ matrix) @ k[:, head // group].T * scale
        if options.soft_cap:
            y = options.soft_cap * torch.tanh(y / options.soft_cap)
        y = y.masked_fill(hidden, -torch.inf)
        if options.sinks is not None:
            sink = options.sinks[head].double().expand(len(q), 1)
            p = torch.softmax(torch.cat([y, sink], 1), 1)[:, :-1]
        else:
            p = torch.softmax(y, 1)
        out[:, head] = p @ v[:, head // group] @ matrix
    return out


def relative_error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return float((ours.double() - exact).norm() / exact.norm().clamp_min(1e-30))


def assert_close(ours, exact, context: str) -> None:
    assert torch.isfinite(ours).all(), f"{context}: not every element is finite"
    error, allowed = relative_error(ours, exact), TOLERANCE[ours.dtype]
    assert error <= allowed, f"{context}: relative L2 {error:.2e}, allowed {allowed:.0e}"


def assert_same_bits(ours, theirs, context: str) -> None:
    if not torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)):
        rows = (ours != theirs).flatten(1).any(1).nonzero().flatten().tolist()
        largest = (ours.double() - theirs.double()).abs().max().item()
        raise AssertionError(
            f"{context}: {len(rows)} of {len(ours)} rows differ, first {rows[:5]}, by up to {largest:.2e}"
        )


def pages_of(layout, lengths) -> int:
    return sum(pages_needed(layout, length) for length in lengths)
