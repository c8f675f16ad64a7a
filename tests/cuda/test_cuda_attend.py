# SPDX-License-Identifier: Apache-2.0
"""attend against float64 attention over the dequantized cache. Outputs are poisoned first; NaN never passes."""

import kvarn
import pytest
import torch
from gpu import DEVICE, FEW_SHAPES, MAIN, SHAPES, Options, World, assert_close, random

LENGTHS = [1, 2, 15, 16, 17, 33, 63, 64, 65, 100, 127, 128, 129, 130, 155, 156, 157, 191, 255, 256, 257, 300, 513, 1000]
DTYPES = [torch.float16, torch.bfloat16]


def check(world, options=None, **run):
    options = options or Options()
    rows = world.run(options=options, **run)
    for request, ours in rows.items():
        context = f"{world.lengths[request]} tokens, {world.news[request]} rows, group {world.group}, {options}"
        assert_close(ours, world.exact(request, options), context)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("preset", "head_dim"), SHAPES)
def test_every_shape(preset, head_dim, dtype):
    layout = kvarn.Layout(preset, head_dim, 2)
    check(World(layout, LENGTHS, [1] * len(LENGTHS), 4, dtype))
    check(World(layout, LENGTHS, [min(1 + r % 8, n) for r, n in enumerate(LENGTHS)], 3, dtype, seed=2))


@pytest.mark.parametrize("group", range(1, 17))
def test_query_heads_per_kv_head(group):
    layout = kvarn.Layout(*MAIN, 3)
    for rows in (1, 2, 5):
        check(World(layout, [700, 5, 129, 256], [rows] * 4, group, seed=group))


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 17, 27, 28, 40, 128, 129, 400])
@pytest.mark.parametrize(("preset", "head_dim"), FEW_SHAPES)
def test_rows_per_request(preset, head_dim, rows):
    layout = kvarn.Layout(preset, head_dim, 2)
    lengths = [rows, rows + 1, rows + 60, rows + 127, rows + 128, rows + 500]
    check(World(layout, lengths, [rows] * len(lengths), 4, seed=rows))


@pytest.mark.parametrize("page_tokens", [128, 64])
def test_rows_over_a_tiles_edge(page_tokens):
    preset = MAIN[0].replace("g128", f"g{page_tokens}")
    if (preset, MAIN[1]) not in SHAPES:
        pytest.skip("the shape is not in this build")
    for rows in (2, 4, 8):
        lengths = [2 * page_tokens + extra for extra in range(rows + 2)]
        check(World(kvarn.Layout(preset, MAIN[1], 1), lengths, [rows] * len(lengths), 8, seed=rows))


@pytest.mark.parametrize("first_tile", range(8))
def test_windows_that_begin_anywhere_in_a_piece(first_tile):
    """Tiles are chained in pieces of 4 at absolute numbers; one request alone: lists are cut inside pieces too."""
    layout = kvarn.Layout(*MAIN, 1)
    for length in (1500, 2900):
        tokens = length - first_tile * layout.page_tokens
        for window in (tokens, tokens - 1, tokens - layout.page_tokens + 1):
            check(World(layout, [length], [1], 4, seed=length), Options(window=window))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("std", [0.1, 1, 5, 20])
@pytest.mark.parametrize("growing", [False, True])
def test_score_ranges(std, growing, dtype):
    layout = kvarn.Layout(*MAIN, 2)
    check(World(layout, [3, 130, 1000, 3000], [1, 2, 3, 4], 4, dtype, query_std=std, growing=growing))


def test_zero_queries_and_one_token():
    world = World(kvarn.Layout(*MAIN, 2), [1, 1, 500, 128], [1, 1, 2, 1])
    for q in world.q:
        q.zero_()
    check(world)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [4096, 8191, 32768, 131072, 262144])
def test_long_sequences(length, dtype):
    check(World(kvarn.Layout(*MAIN, 1), [length, 77], [1, 1], 8, dtype))
    check(World(kvarn.Layout(*MAIN, 1), [length], [4], 2, dtype, growing=True))


@pytest.mark.parametrize("head_dim", sorted({head_dim for _, head_dim in SHAPES}))
@pytest.mark.parametrize("options", [
    Options(soft_cap=30.0), Options(soft_cap=2.0), Options(window=1), Options(window=16), Options(window=100),
    Options(window=128), Options(window=300, soft_cap=5.0), Options(window=10**6), Options(scale=1.0),
    Options(scale=-0.05), Options(scale=0.0),
], ids=str)  # fmt: skip
def test_options(head_dim, options):
    preset = next(preset for preset, d in SHAPES if d == head_dim)
    layout = kvarn.Layout(preset, head_dim, 2)
    check(World(layout, [1, 90, 129, 300, 2000], [1, 2, 4, 8, 3], 4, query_std=2), options)


@pytest.mark.parametrize("options", [Options(), Options(soft_cap=10.0), Options(window=200)], ids=str)
def test_sinks(options):
    layout = kvarn.Layout(*MAIN, 2)
    options.sinks = torch.linspace(-4, 12, 8, device=DEVICE)
    check(World(layout, [1, 90, 129, 300, 5000], [1, 2, 4, 8, 1], 4), options)
    options.sinks = torch.full((8,), -float("inf"), device=DEVICE)
    check(World(layout, [40, 300], [1, 2], 4), options)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
@pytest.mark.parametrize(("preset", "head_dim"), SHAPES)
def test_balance_is_queries_multiplied(preset, head_dim, dtype):
    """Bit for bit what multiplied queries get, which float32 holds exactly."""
    world = World(kvarn.Layout(preset, head_dim, 2), [3, 300, 129, 500], [1, 2, 8, 100], 4, dtype)
    world.run()
    step, q = world.step(range(4)), torch.cat(world.q)
    balance = (random((2, head_dim), 8).float() * 2).round().clamp(-9, 9).exp2()
    by_hand = q.float() * balance.repeat_interleave(4, 0)
    given = {"scale": 0.1, "soft_cap": 20.0}
    ours, theirs = (torch.full_like(q, float("nan")) for _ in range(2))
    kvarn.attend(world.layout, world.pages, *step, q, out=ours, balance=balance, **given)
    kvarn.attend(world.layout, world.pages, *step, by_hand, out=theirs, **given)
    assert torch.equal(ours, theirs) and torch.isfinite(ours).all()


def test_float32_rows_and_strides():
    world = World(kvarn.Layout(*MAIN, 2), [40, 300, 129], [1, 2, 4], dtype=torch.float32)
    check(world)
    wide = [torch.full((len(q), q.shape[1] + 3, q.shape[2] + 8), float("nan"), device=DEVICE) for q in world.q]
    for q, room in zip(world.q, wide, strict=True):
        room[:, 1 : 1 + q.shape[1], : q.shape[2]] = q
    world.q = [room[:, 1 : 1 + q.shape[1], : q.shape[2]] for q, room in zip(world.q, wide, strict=True)]
    check(world)


def test_ragged_batches():
    lengths = [int(x) for x in torch.randint(1, 3000, (100,), generator=torch.Generator().manual_seed(3))]
    check(World(kvarn.Layout(*MAIN, 1), lengths, [min(n, 1 + r % 3) for r, n in enumerate(lengths)], 4))


def test_rows_that_take_no_part_are_zeros():
    layout = kvarn.Layout(*MAIN, 2)
    world = World(layout, [300, 90], [2, 1])
    table, lengths, starts = world.step([0, 1])
    world.run()
    lengths[1] = 0
    q = random((6, 8, layout.head_dim), 1)  # three rows are nobody's
    out = torch.full_like(q, float("nan"))
    kvarn.attend(layout, world.pages, table, lengths, starts, q, scale=0.1, out=out)
    assert (out[2:] == 0).all() and (out[:2] != 0).any() and torch.isfinite(out).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_query_poisons_its_own_rows_only(bad):
    world = World(kvarn.Layout(*MAIN, 2), [300, 500, 129], [3, 2, 1])
    clean = world.run()
    world.q[1][0, 2, 5] = bad
    dirty = world.run()
    assert torch.isnan(dirty[1][0, 2]).all()
    dirty[1][0, 2] = clean[1][0, 2]
    for request, rows in clean.items():
        assert torch.equal(rows, dirty[request])
