# SPDX-License-Identifier: Apache-2.0
"""The pages and tables of a prefill: attention over each of its sequences, in float64, is attention over the cache."""

import kvarn
import pytest
import torch
from gpu import DEVICE, FEW_SHAPES, Options, World, attention, ints, relative_error, workspace
from kvarn import cuda


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("room", ["enough", "too little"])
@pytest.mark.parametrize("last", [7, 5])
@pytest.mark.parametrize(("preset", "head_dim"), FEW_SHAPES)
def test_sequences_attend_to_the_cache(preset, head_dim, room, last, dtype):
    layout = kvarn.Layout(preset, head_dim, 2)
    G, first = layout.page_tokens, 2
    world = World(layout, [300, 90, 700, 129, 256, 40, 1000], [1, 1, 650, 1, 200, 40, 5], 2)
    order, tokens = list(range(7)), sum(world.news)
    step, space = world.step(order), workspace(layout, tokens, 7, max_seq_len=1000)
    k, v, q = (torch.cat([x[r][len(x[r]) - world.news[r] :] for r in order]) for x in (world.k, world.v, world.q))
    plan = kvarn.plan(layout, *step, tokens=tokens, workspace=space)
    pages = world.before.clone()
    kvarn.append(layout, pages, *step, k, v, plan=plan)
    sequences, width = tokens // G + 14, 1000 // G + 2
    tiles = [(world.starts[r] // G, (world.lengths[r] - 1) // G) for r in order[first:last]]
    needed = sum(end + end - own + 1 for own, end in tiles)  # packed ones, which query tiles share, and raw ones
    count = needed if room == "enough" else needed - 3
    table, lengths = (torch.full(s, -9, dtype=torch.int32, device=DEVICE) for s in ((sequences, width), (sequences,)))
    starts, overflow = torch.full((sequences + 1,), -9, dtype=torch.int32, device=DEVICE), ints([-9])
    k_pages, v_pages = (torch.full((count * G, 2, head_dim), float("nan"), dtype=dtype, device=DEVICE) for _ in "kv")
    cuda.prefill_pages(plan, pages, table, lengths, starts, k_pages, v_pages, overflow, range(first, last))
    if room == "too little":
        assert int(overflow) == 3
        return
    assert int(overflow) == 0
    world.pages, scale = pages, head_dim**-0.5
    exact = torch.cat([world.exact(r) for r in order])
    ours, used = torch.zeros_like(exact), 0
    for i in range(sequences):
        begin, end, length = int(starts[i]), int(starts[i + 1]), int(lengths[i])
        assert begin <= end
        if length == 0:
            assert begin == end
            continue
        used += end - begin
        places = table[i, : -(-length // G)].long()
        assert (places >= 0).all() and (places < count).all()
        keys, values = (
            x.view(count, G, 2, head_dim)[places].flatten(0, 1)[:length].double() for x in (k_pages, v_pages)
        )
        ours[begin:end] = attention(q[begin:end], keys, values, length - (end - begin), scale, Options())
    rows = slice(sum(world.news[:first]), sum(world.news[:last]))
    assert used == rows.stop - rows.start
    assert relative_error(ours[rows], exact[rows]) < (1e-3 if dtype == torch.float16 else 8e-3)
