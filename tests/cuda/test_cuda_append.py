# SPDX-License-Identifier: Apache-2.0
"""append and expand give the CPU's bytes: golden records, and random steps over every shape and both encoders."""

import kvarn
import numpy as np
import pytest
import torch
from cases import ENCODERS, Step, assert_same_pages, disjoint_tables, golden, hashed, pool
from gpu import DEVICE, FEW_SHAPES, MAIN, SHAPES, ints
from verbs import CudaVerbs, up

KEPT = golden.load()


@pytest.mark.parametrize(("preset", "head_dim"), SHAPES)
def test_golden_records(preset, head_dim):
    for encoder in (name for *shape, name in KEPT if shape == [preset, head_dim]):
        digest, _ = KEPT[preset, head_dim, encoder]
        record = golden.record(CudaVerbs(), preset, head_dim, encoder)
        assert f"{golden.fnv1a64(record.tobytes()):016x}" == digest, encoder


def steps(layout, seed):
    """Lengths after and new tokens of three requests, step by step: prompts, chunks, decode, drafts, a tile's edge."""
    G, n = layout.page_tokens, layout.raw_tokens_per_page
    draw = np.random.default_rng(seed)
    lengths = np.zeros(3, int)
    for news in (
        [1, G - 1, 2 * G + 5], [1, 1, 1], [G + n + 3, 1, n + 2], [n, 1, 0], [3 * G, G, 1], draw.integers(1, 2 * G, 3),
        [1, 1, 1], draw.integers(0, n, 3),
    ):  # fmt: skip
        lengths = lengths + news
        yield lengths.tolist(), [int(new) for new in news]


def inputs(layout, tokens, seed, wild=False):
    k, v = (hashed((tokens, layout.kv_heads, layout.head_dim), seed + side) for side in (0, 1))
    k[..., 5] = k[..., 5] * 8 + 24
    if wild:
        k[::7, 0, 3], v[::5, 0, 9], v[::11, -1, 0], k[::13] = np.nan, np.inf, -1e30, 0
        v[3::17] = -0.0
    return k, v


def matrices(layout):
    """Feedback of two heads, one of them with numbers that nobody should give."""
    b = np.concatenate([golden.golden_feedback(layout.head_dim)] * 2)
    b[1, 3, 60], b[1, 5, 50], b[1, 7, 8], b[1, 0, 9], b[1, 2, 40] = np.nan, np.inf, -np.inf, 3e38, -1e30
    return b


def balance(layout):
    """Of two heads, from 2^-12 to 2^12: some elements leave f16's range in either direction."""
    size = layout.kv_heads * layout.head_dim
    return np.exp2(np.arange(size) * 7 % 25 - 12).astype(np.float32).reshape(layout.kv_heads, layout.head_dim)


@pytest.mark.parametrize("encoder", [*ENCODERS, "feedback", "balanced"])
@pytest.mark.parametrize(("preset", "head_dim"), SHAPES)
def test_bytes_of_random_steps(preset, head_dim, encoder):
    layout, verbs = kvarn.Layout(preset, head_dim, 2), CudaVerbs()
    how = {"encoder": encoder} if encoder in ENCODERS else {"feedback": matrices(layout)}
    if encoder == "balanced":
        how["balance"] = balance(layout)
    every = list(steps(layout, head_dim))
    tables, count = disjoint_tables(layout, [max(lengths[r] for lengths, _ in every) for r in range(3)])
    ours, theirs = pool(layout, count), pool(layout, count)
    for number, (lengths, news) in enumerate(every):
        step, (k, v) = Step.of(tables, lengths, news), inputs(layout, sum(news), number, wild=number % 3 == 2)
        expected = kvarn.append(layout, theirs, *step, k, v, **how)
        replaced = verbs.append(layout, ours, *step, k, v, **how)
        assert_same_pages(layout, ours, theirs, f"{encoder}, step {number}")
        assert replaced == expected
    for x, y in zip(
        verbs.expand(layout, ours, *list(step)[:2]), kvarn.expand(layout, theirs, *list(step)[:2]), strict=True
    ):
        assert np.array_equal(x, y)


@pytest.mark.parametrize("feed", [False, True])
@pytest.mark.parametrize(("preset", "head_dim"), FEW_SHAPES)
def test_more_tiles_than_ctas(preset, head_dim, feed):
    """K and V of a tile in one CTA, and several tiles for each."""
    layout, tokens = kvarn.Layout(preset, head_dim, 2), 300 * 128
    tables, count = disjoint_tables(layout, [tokens])
    step, ours = Step.of(tables, [tokens], [tokens]), pool(layout, count)
    theirs, (k, v), b = ours.copy(), inputs(layout, tokens, 6), matrices(layout) if feed else None
    kvarn.append(layout, theirs, *step, k, v, feedback=b)
    on_device = up(ours)
    kvarn.append(layout, on_device, *map(up, step), up(k), up(v), feedback=up(b) if feed else None)
    assert_same_pages(layout, on_device.cpu().numpy(), theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("preset", "head_dim"), FEW_SHAPES)
def test_dtypes_and_strides(preset, head_dim, dtype):
    """k and v of other dtypes and of a qkv tensor's strides; more heads than one CTA's worth."""
    layout, tokens = kvarn.Layout(preset, head_dim, 5), 300
    tables, count = disjoint_tables(layout, [tokens])
    step, ours = Step.of(tables, [tokens], [tokens]), pool(layout, count)
    theirs, (k, v) = ours.copy(), inputs(layout, tokens, 3)
    qkv = torch.full((tokens, 20, head_dim + 8), float("nan"), dtype=dtype)
    qkv[:, 4:9, :head_dim], qkv[:, 12:17, :head_dim] = torch.from_numpy(k), torch.from_numpy(v)
    kvarn.append(layout, theirs, *step, qkv[:, 4:9, :head_dim], qkv[:, 12:17, :head_dim])
    on_device, wide = up(ours), qkv.to(DEVICE)
    kvarn.append(layout, on_device, *map(up, step), wide[:, 4:9, :head_dim], wide[:, 12:17, :head_dim])
    assert_same_pages(layout, on_device.cpu().numpy(), theirs, str(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("preset", "head_dim"), FEW_SHAPES)
def test_expand_dtypes_and_room(preset, head_dim, dtype):
    layout, lengths = kvarn.Layout(preset, head_dim, 3), [5, 1030, 0, 256, 129]
    G = layout.page_tokens
    tables, count = disjoint_tables(layout, lengths)
    step, pages = Step.of(tables, lengths, lengths), pool(layout, count)
    kvarn.append(layout, pages, *step, *inputs(layout, sum(lengths), 5))
    expected = [torch.from_numpy(x).to(dtype) for x in kvarn.expand(layout, pages, step.block_table, step.seq_lens)]
    tokens, on_device = len(expected[0]), [up(x) for x in (pages, step.block_table, step.seq_lens)]
    for x, y in zip(kvarn.expand(layout, *on_device, dtype=dtype), expected, strict=True):
        assert torch.equal(x.cpu(), y)
    for room in (tokens + 7, tokens - 1, 2 * G, 0):
        out = [torch.full((room, 3, head_dim), 7.0, dtype=dtype, device=DEVICE) for _ in range(2)]
        kvarn.expand(layout, *on_device, out=out)
        written = min(tokens, room // G * G)
        for x, y in zip(out, expected, strict=True):
            assert torch.equal(x[:written].cpu(), y[:written])
            assert (x[written:] == 7).all()


@pytest.mark.parametrize("head_dim", sorted({head_dim for _, head_dim in SHAPES} | {64, 96, 128, 256}))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rotate(head_dim, dtype):
    x = torch.from_numpy(hashed((37, 5, head_dim), 4)).to(dtype)
    assert torch.equal(kvarn.rotate(x.to(DEVICE)).cpu(), kvarn.rotate(x))
    strided = x.to(DEVICE).repeat(1, 1, 2)[::3, 1:4, :head_dim]
    assert torch.equal(kvarn.rotate(strided).cpu(), kvarn.rotate(x[::3, 1:4]))


def test_slots_of_minus_one_write_nothing():
    layout = kvarn.Layout(*MAIN, 2)
    tables, count = disjoint_tables(layout, [200, 130, 60])
    step = Step.of(tables, [200, 130, 60], [200, 130, 60])
    pages = up(pool(layout, count))
    before, (k, v) = pages.clone(), inputs(layout, 390, 1)
    slots = torch.arange(390, device=DEVICE)
    slots[200:330] = -1
    replaced = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    k[210] = np.nan
    q = torch.randn(390, 4, layout.head_dim, device=DEVICE, dtype=torch.float16)
    plan = kvarn.plan(layout, *map(up, step), tokens=390, query_heads=4, slots=slots)
    kvarn.append(layout, pages, None, None, None, up(k), up(v), plan=plan, replaced=replaced)
    out = torch.full_like(q, float("nan"))
    kvarn.attend(layout, pages, None, None, None, q, scale=0.1, out=out, plan=plan)
    silent = ints(tables[1]).long()
    assert torch.equal(pages[silent], before[silent])
    assert int(replaced) == 0
    assert (out[200:330] == 0).all() and torch.isfinite(out).all()
    expected = pool(layout, count)
    loud = Step.of([tables[0], [], tables[2]], [200, 0, 60], [200, 130, 60])
    kvarn.append(layout, expected, *loud, k, v)
    assert_same_pages(layout, pages.cpu().numpy(), expected)
