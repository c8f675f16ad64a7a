# SPDX-License-Identifier: Apache-2.0
"""Random steps: shapes, heads, rows, options, dtypes and grids drawn together. Right, and alone the same bits."""

import kvarn
import numpy as np
import pytest
import torch
from gpu import DEVICE, SHAPES, Options, World, assert_close, assert_same_bits, workspace


def draw_world(draw):
    preset, head_dim = SHAPES[draw.integers(len(SHAPES))]
    layout = kvarn.Layout(preset, head_dim, int(draw.choice([1, 2, 3, 8])))
    requests, longest = int(draw.integers(1, 12)), int(draw.choice([200, 1500, 6000]))
    lengths = [int(n) for n in draw.integers(1, longest, requests)]
    if draw.integers(3) == 0:  # the last rows complete tiles
        lengths = [-(-n // layout.page_tokens) * layout.page_tokens for n in lengths]
    most = int(draw.choice([1, 4, 8, 60, 700]))
    news = [int(min(n, draw.integers(1, most + 1))) for n in lengths]
    group = int(draw.choice([1, 2, 3, 4, 5, 7, 8, 16]))
    dtype = [torch.float16, torch.bfloat16][draw.integers(2)]
    std = float(draw.choice([0.1, 1, 3]))
    return World(layout, lengths, news, group, dtype, int(draw.integers(1000)), std, bool(draw.integers(5) == 0))


def draw_options(draw, world):
    options = Options()
    if draw.integers(3) == 0:
        options.window = int(draw.integers(1, 2 * max(world.lengths)))
    if draw.integers(3) == 0:
        options.soft_cap = float(draw.choice([5, 30, 50]))
    if draw.integers(3) == 0:
        heads = world.group * world.layout.kv_heads
        options.sinks = torch.from_numpy(draw.normal(0, 3, heads).astype(np.float32)).to(DEVICE)
    return options


@pytest.mark.parametrize("seed", range(60))
def test_random_steps(seed):
    draw = np.random.default_rng(seed)
    world = draw_world(draw)
    options, context = draw_options(draw, world), f"{world.layout}, lengths {world.lengths}, rows {world.news}"
    tokens, requests = sum(world.news), len(world.lengths)
    limits = dict(tokens=max(16, tokens + int(draw.integers(100))), requests=requests + int(draw.integers(5)))
    space = workspace(world.layout, **limits, max_seq_len=max(world.lengths) + int(draw.integers(9000)),
                      ctas=int(draw.integers(0, 300)))  # fmt: skip
    order = draw.permutation(requests).tolist()
    longest = max(world.news) + int(draw.integers(0, 20))
    rows = world.run(order, options, space, max_query_len=longest, defer=bool(seed % 2))
    for request in draw.permutation(requests)[:4].tolist():
        assert_close(rows[request], world.exact(request, options), f"{context}, {options}: request {request}")
    for request in draw.permutation(requests)[:3].tolist():
        alone = world.run([request], options)[request]
        assert_same_bits(alone, rows[request], f"{context}, {options}: request {request} alone")


@pytest.mark.parametrize("seed", range(8))
def test_without_a_plan(seed):
    """append and attend by themselves, in the workspaces that kvarn keeps: the bits of a planned step."""
    world = draw_world(np.random.default_rng(1000 + seed))
    order = list(range(len(world.lengths)))
    expected = world.run(order)
    step, pages = world.step(order), world.before.clone()
    k, v, q = (torch.cat([x[r][len(x[r]) - world.news[r] :] for r in order]) for x in (world.k, world.v, world.q))
    kvarn.append(world.layout, pages, *step, k, v)
    out = kvarn.attend(world.layout, pages, *step, q, scale=world.layout.head_dim**-0.5)
    assert torch.equal(pages, world.pages)
    assert_same_bits(out, torch.cat([expected[r] for r in order]), str(world.layout))
