# SPDX-License-Identifier: Apache-2.0
"""Pools beyond 2^31 and 2^32 bytes: offsets are 64-bit."""

import kvarn
import pytest
import torch
from gpu import DEVICE, MAIN, World, assert_same_bits, workspace


@pytest.mark.parametrize("gigabytes", [3, 6, 20])
def test_pages_at_the_end_of_a_large_pool(gigabytes):
    layout = kvarn.Layout(*MAIN, 2)
    count = (gigabytes << 30) // layout.page_bytes
    if torch.cuda.mem_get_info()[0] < (gigabytes + 4) << 30:
        pytest.skip("not enough device memory")
    world = World(layout, [300, 1000, 129, 600], [2, 1, 1, 500])
    expected, small = world.run(), world.pages
    spread = {page: count - 1 - 1000 * i for i, page in enumerate(sorted({p for t in world.tables for p in t}))}
    pool = torch.full((count, layout.page_bytes), 255, dtype=torch.uint8, device=DEVICE)
    for page, far in spread.items():
        pool[far] = world.before[page]
    near, world.tables = world.tables, [[spread[page] for page in table] for table in world.tables]
    rows = world.run(pages=pool)
    for request, ours in rows.items():
        assert_same_bits(ours, expected[request], f"request {request}")
    for table in near:
        for page in table:
            assert torch.equal(pool[spread[page]], small[page])
    k, v = kvarn.expand(layout, pool, *world.step([0, 1, 2, 3])[:2], dtype=torch.float16)
    world.tables = near
    for x, y in zip(
        (k, v), kvarn.expand(layout, small, *world.step([0, 1, 2, 3])[:2], dtype=torch.float16), strict=True
    ):
        assert torch.equal(x, y)


def test_wide_page_strides():
    """Pages of one layer among those of others: stride * count is far beyond 2^32."""
    layout = kvarn.Layout(*MAIN, 2)
    world = World(layout, [300, 1000], [2, 1])
    expected = world.run()
    stride = 1 << 28
    if torch.cuda.mem_get_info()[0] < len(world.before) * stride + (4 << 30):
        pytest.skip("not enough device memory")
    memory = torch.empty(len(world.before) * stride, dtype=torch.uint8, device=DEVICE)
    pages = memory.view(-1, stride)[:, : layout.page_bytes]
    pages.copy_(world.before)
    for request, ours in world.run(pages=pages, space=workspace(layout, 16, 2)).items():
        assert_same_bits(ours, expected[request], f"request {request}")
