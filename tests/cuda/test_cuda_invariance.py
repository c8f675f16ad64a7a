# SPDX-License-Identifier: Apache-2.0
"""The bits of a row depend on its own request's tokens only."""

import kvarn
import pytest
import torch
from gpu import DEVICE, FEW_SHAPES, MAIN, Options, World, assert_same_bits, ints, workspace

LENGTHS = [1, 40, 128, 129, 300, 1000, 2500, 9000, 257, 700]


def worlds(layout, dtype=torch.float16):
    yield World(layout, LENGTHS, [1] * len(LENGTHS), 4, dtype)
    yield World(layout, LENGTHS, [min(n, 1 + r % 5) for r, n in enumerate(LENGTHS)], 4, dtype, seed=3)
    yield World(layout, LENGTHS, [1, 40, 100, 3, 290, 1, 600, 200, 2, 129], 2, dtype, seed=4)


def same(ours, theirs, context):
    for request, rows in ours.items():
        assert_same_bits(rows, theirs[request], f"{context}, request {request}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("preset", "head_dim"), FEW_SHAPES)
def test_order_subsets_and_reruns(preset, head_dim, dtype):
    for world in worlds(kvarn.Layout(preset, head_dim, 2), dtype):
        everything = world.run()
        same(world.run(), everything, "again")
        same(world.run([7, 3, 9, 0, 5, 1, 8, 2, 6, 4]), everything, "permuted")
        same(world.run([6, 2, 4]), everything, "a subset")
        for request in range(len(LENGTHS)):
            same(world.run([request]), everything, "alone")


@pytest.mark.parametrize("ctas", [1, 2, 7, 31, 132, 200, 511, 1023])
@pytest.mark.parametrize("options", [Options(), Options(window=700), Options(soft_cap=20.0)], ids=str)
def test_other_grids(ctas, options):
    layout = kvarn.Layout(*MAIN, 2)
    for world in worlds(layout):
        space = workspace(layout, 2048, 10, max_seq_len=9000, ctas=ctas)
        same(world.run(options=options, space=space), world.run(options=options), f"{ctas} CTAs")


def test_other_limits_and_longer_announced_steps():
    layout = kvarn.Layout(*MAIN, 2)
    for world in worlds(layout):
        everything = world.run()
        same(world.run(space=workspace(layout, 4096, 100, 8, 1 << 20)), everything, "larger limits")
        for longest in (650, 1000, 2048):
            same(world.run(max_query_len=longest), everything, f"max_query_len {longest}")


@pytest.mark.parametrize("group", [1, 2, 4, 5, 8, 16])
def test_rows_beside_it(group):
    """Each token alone, and as one of several rows (drafts, a chunk): the same bits."""
    layout, length, most = kvarn.Layout(*MAIN, 2), 389, 30
    whole = World(layout, [length], [length], group)
    expected = whole.run()[0]
    for rows in (1, 2, 3, 4, 6, 8, 16, most):
        pages, start = whole.before.clone(), 0
        space = workspace(layout, 512, 1, max_seq_len=length)
        while start < length:
            end = min(length, start + (rows if start >= 90 else 90))
            table, lengths, starts = whole._tables([0]), ints([end]), ints([0, end - start])
            plan = kvarn.plan(
                layout, table, lengths, starts, tokens=end - start, query_heads=2 * group, workspace=space
            )
            k, v, q = (side[0][start:end] for side in (whole.k, whole.v, whole.q))
            kvarn.append(layout, pages, table, lengths, starts, k, v, plan=plan)
            out = kvarn.attend(layout, pages, table, lengths, starts, q, scale=layout.head_dim**-0.5, plan=plan)
            assert_same_bits(out, expected[start:end], f"{rows} rows at a time, from {start}")
            start = end


def test_drafts_beside_other_drafts():
    """Another request's rows, another group of columns: nothing changes for a request with one row."""
    layout = kvarn.Layout(*MAIN, 2)
    one = World(layout, [5000, 300], [1, 1])
    expected = one.run()
    many = World(layout, [5000, 300], [1, 8])
    many.k[0], many.v[0], many.q[0] = one.k[0], one.v[0], one.q[0]
    assert_same_bits(many.run()[0], expected[0], "beside 8 drafts")


def test_window_and_its_absence():
    """A window that covers everything gives the bits of none at all."""
    layout = kvarn.Layout(*MAIN, 2)
    for world in worlds(layout):
        same(world.run(options=Options(window=10**6)), world.run(), "window of 10^6")


def test_replay_on_other_streams():
    layout = kvarn.Layout(*MAIN, 2)
    world = World(layout, LENGTHS, [1] * len(LENGTHS))
    everything = world.run()
    stream = torch.cuda.Stream(DEVICE)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        same(world.run(), everything, "another stream")
        stream.synchronize()
