# SPDX-License-Identifier: Apache-2.0
"""Tiles that append leaves to pack: the same bytes as if it had packed them, of all layers, and nobody misses them."""

import kvarn
import pytest
import torch
from cases import ENCODERS, Step, assert_same_pages, disjoint_tables, pool
from gpu import DEVICE, FEW_SHAPES, MAIN, SHAPES, Options, World, assert_same_bits, ints, rubbish, workspace
from test_cuda_append import balance, inputs, matrices, steps
from verbs import up


@pytest.mark.parametrize("encoder", [*ENCODERS, "feedback"])
@pytest.mark.parametrize(("preset", "head_dim"), SHAPES)
def test_bytes_of_three_layers(preset, head_dim, encoder):
    """Against the CPU, over prompts, chunks, decode and drafts; layers differ in values, feedback and balance."""
    layout, encodes = kvarn.Layout(preset, head_dim, 2), {"encoder": encoder if encoder in ENCODERS else "weighted"}
    every = list(steps(layout, head_dim))
    before = every[-1][0]
    full = [(n // layout.page_tokens + 1) * layout.page_tokens for n in before]  # all last rows complete a tile
    every.append((full, [new - n for new, n in zip(full, before, strict=True)]))
    tables, count = disjoint_tables(layout, [max(lengths[r] for lengths, _ in every) for r in range(3)])
    fed = encoder == "feedback"
    feedback = [None, matrices(layout), matrices(layout)[::-1].copy()] if fed else [None] * 3
    divisors = [None, balance(layout), None]
    theirs = [pool(layout, count) for _ in range(3)]
    ours = [up(pages) for pages in theirs]
    layers = kvarn.cuda.Layers(layout, ours, [b if b is None else up(b) for b in feedback])
    space = workspace(layout, 1200, 3, 0, 2048)
    for number, (lengths, news) in enumerate(every):
        step = Step.of(tables, lengths, news)
        on_device = [up(x) for x in step]
        plan = kvarn.plan(
            layout, *on_device, tokens=sum(news), max_query_len=max(news), defer=True, workspace=space
        )  # fmt: skip
        for layer in range(3):
            k, v = inputs(layout, sum(news), 10 * number + layer, wild=number % 3 == 2)
            kvarn.append(
                layout, theirs[layer], *step, k, v, feedback=feedback[layer], balance=divisors[layer], **encodes
            )
            kvarn.append(
                layout, ours[layer], None, None, None, up(k), up(v), plan=plan, feedback=layers.feedback[layer],
                balance=None if divisors[layer] is None else up(divisors[layer]), **encodes,
            )  # fmt: skip
        kvarn.cuda.pack(plan, layers, **encodes)
        for layer in range(3):
            assert_same_pages(layout, ours[layer].cpu().numpy(), theirs[layer], f"step {number}, layer {layer}")


@pytest.mark.parametrize(("preset", "head_dim"), FEW_SHAPES)
def test_attention_does_not_miss_them(preset, head_dim):
    layout = kvarn.Layout(preset, head_dim, 2)
    G = layout.page_tokens
    for news in ([1, 1, 1, 1], [4, 1, 7, 3], [G, 2 * G + 1, 3, 5]):
        world = World(layout, [3 * G, 7 * G, 2 * G, 2 * G + 1], news)
        expected, pages = world.run(), world.pages
        rows = world.run(defer=True)
        assert torch.equal(world.pages, pages)
        for request, row in rows.items():
            assert_same_bits(row, expected[request], f"request {request}, {news}")


def appended(world, order, tables=None):
    """The pool after append of a plan that defers, before pack; the plan, and the rows of attention."""
    step, pages, layout = world.step(order), world.before.clone(), world.layout
    if tables is not None:
        step = ints(tables), *step[1:]
    k, v, q = (torch.cat([x[r][len(x[r]) - world.news[r] :] for r in order]) for x in (world.k, world.v, world.q))
    plan = kvarn.plan(
        layout, *step, tokens=len(q), query_heads=q.shape[1], max_query_len=max(world.news), defer=True,
        workspace=workspace(layout, 1024, len(order), max_seq_len=4096),
    )  # fmt: skip
    kvarn.append(layout, pages, *step, k, v, plan=plan)
    out = kvarn.attend(layout, pages, *step, q, scale=world.scale(Options()), plan=plan)
    return pages, plan, out


def test_only_what_nobody_reads_is_left():
    """A page that another request of the step has, or that later rows of its own need, is packed by append."""
    layout = kvarn.Layout(*MAIN, 2)
    G = layout.page_tokens
    world = World(layout, [3 * G, 3 * G + 1, 2 * G + 2], [1, 1, 4])
    own, other, third = world.tables
    world.run()
    packed = world.pages

    def changed(pages, page):
        return not torch.equal(pages[page], world.before[page])

    pages, plan, _ = appended(world, [0, 1, 2])
    assert not changed(pages, own[2]), "left to pack"
    assert torch.equal(pages[third[1]], packed[third[1]]), "rows of its own lie behind it"
    kvarn.cuda.pack(plan, kvarn.cuda.Layers(layout, [pages]))
    assert torch.equal(pages[own[2]], packed[own[2]])

    # The second request has found the first one's pages in the prefix cache, in the very step that fills the third.
    width = max(map(len, world.tables))
    shared = [own, own[:3] + other[3:], third]
    pages, plan, rows = appended(world, [0, 1, 2], [t + [-7] * (width - len(t)) for t in shared])
    assert torch.equal(pages[own[2]], packed[own[2]]), "another request reads it"
    kvarn.cuda.pack(plan, kvarn.cuda.Layers(layout, [pages]))
    assert torch.isfinite(rows).all()
    world.tables = shared
    expected = torch.cat(list(world.run().values()))
    assert torch.equal(world.pages, pages)
    assert_same_bits(rows, expected, "a page shared in the step that fills it")


def test_more_requests_than_threads_of_the_plan():
    layout, requests = kvarn.Layout(*MAIN, 1), 2100
    G, each = layout.page_tokens, layout.pages_ahead + 1
    table = torch.randperm(requests * each, device=DEVICE).int().view(requests, each)
    lengths = torch.where(torch.arange(requests, device=DEVICE) % 3 == 0, G - 1, G).int()
    k, v = (torch.randn(requests, 1, layout.head_dim, device=DEVICE) for _ in "kv")
    before, results = rubbish(layout, requests * each), []
    space = workspace(layout, requests, requests, 0, 256)
    for defer in (False, True):
        pages = before.clone()
        step = table, lengths, torch.arange(requests + 1, device=DEVICE).int()
        plan = kvarn.plan(layout, *step, tokens=requests, max_query_len=1, defer=defer, workspace=space)
        kvarn.append(layout, pages, *step, k, v, plan=plan)
        if defer:
            kvarn.cuda.pack(plan, kvarn.cuda.Layers(layout, [pages]))
        results.append(pages)
    assert torch.equal(*results)


def test_more_layers_than_one_launch_takes():
    layout, count, requests = kvarn.Layout(*MAIN, 1), 130, 2
    G, each = layout.page_tokens, layout.pages_ahead + 2
    table, lengths = ints([list(range(each)), list(range(each, 2 * each))]), ints([2 * G, G])
    step = table, lengths, ints([0, 1, 2])
    before, results = rubbish(layout, count * 2 * each), []
    space = workspace(layout, requests, requests, 0, 512)
    for defer in (False, True):
        pools = before.clone().view(count, 2 * each, -1)
        plan = kvarn.plan(layout, *step, tokens=requests, max_query_len=1, defer=defer, workspace=space)
        for layer in range(count):
            k = torch.full((requests, 1, layout.head_dim), 0.01 * layer, device=DEVICE)
            kvarn.append(layout, pools[layer], *step, k, k + 1, plan=plan)
        if defer:
            kvarn.cuda.pack(plan, kvarn.cuda.Layers(layout, list(pools)))
        results.append(pools)
    assert torch.equal(*results)


def test_wrong_use_is_refused():
    layout = kvarn.Layout(*MAIN, 2)
    world = World(layout, [300], [1])
    step, layers = world.step([0]), kvarn.cuda.Layers(layout, [world.before])
    space = workspace(layout, 16, 1)
    with pytest.raises(ValueError, match="does not defer"):
        kvarn.cuda.pack(kvarn.plan(layout, *step, tokens=1, workspace=space), layers)
    plan = kvarn.plan(layout, *step, tokens=1, defer=True, workspace=space)
    with pytest.raises(ValueError, match="the layers are of"):
        kvarn.cuda.pack(plan, kvarn.cuda.Layers(kvarn.Layout(*MAIN, 1), [world.before[:, : layout.page_bytes // 2]]))
    with pytest.raises(ValueError, match="encoder"):
        kvarn.cuda.pack(plan, layers, encoder="best")
    with pytest.raises(ValueError, match="513 layers"):
        kvarn.cuda.pack(plan, kvarn.cuda.Layers(layout, [world.before] * 513))
    with pytest.raises(ValueError, match="2 layers have pages and 1 feedback"):
        kvarn.cuda.Layers(layout, [world.before] * 2, [None])
    with pytest.raises(TypeError, match="float32"):
        kvarn.cuda.Layers(layout, [world.before], [torch.zeros(2, layout.head_dim, layout.head_dim).half().to(DEVICE)])
    kvarn.cuda.pack(plan, kvarn.cuda.Layers(layout, []))
