# SPDX-License-Identifier: Apache-2.0
"""A captured step, replayed with other lengths, tables and rows in the same memory; and torch.compile."""

import kvarn
import pytest
import torch
from gpu import DEVICE, FEW_SHAPES, MAIN, World, assert_same_bits, ints, pages_of, random, rubbish, workspace


class Buffers:
    """The tensors of a step of up to `requests` requests with `rows` rows each, at fixed addresses."""

    def __init__(self, layout, requests, rows, width, group, count, defer):
        tokens, H, D = requests * rows, layout.kv_heads, layout.head_dim
        self.layout, self.rows, self.defer = layout, rows, defer
        self.table = torch.zeros(requests, width, dtype=torch.int32, device=DEVICE)
        self.lengths = torch.zeros(requests, dtype=torch.int32, device=DEVICE)
        self.starts = torch.zeros(requests + 1, dtype=torch.int32, device=DEVICE)
        self.slots = torch.full((tokens,), -1, dtype=torch.int64, device=DEVICE)
        self.k, self.v = (torch.zeros(tokens, H, D, dtype=torch.float16, device=DEVICE) for _ in "kv")
        self.q, self.out = (torch.zeros(tokens, H * group, D, dtype=torch.float16, device=DEVICE) for _ in "qo")
        self.pages = rubbish(layout, count)
        self.space = workspace(layout, tokens, requests, H * group, 8192)

    def step(self):
        layout, tables = self.layout, (self.table, self.lengths, self.starts)
        plan = kvarn.plan(
            layout, *tables, tokens=len(self.q), query_heads=self.q.shape[1], max_query_len=self.rows, slots=self.slots,
            workspace=self.space, defer=self.defer,
        )  # fmt: skip
        kvarn.append(layout, self.pages, *tables, self.k, self.v, plan=plan)
        kvarn.attend(layout, self.pages, *tables, self.q, scale=0.1, out=self.out, plan=plan)
        if self.defer:
            kvarn.cuda.pack(plan, kvarn.cuda.Layers(layout, [self.pages]))

    def fill(self, world, order):
        """A step of `world` in the first places; the others are padding, as an engine pads a captured batch."""
        table, lengths, starts = world.step(order)
        n, tokens = len(order), int(starts[-1])
        for x in (self.table, self.lengths, self.starts):
            x.zero_()
        self.table[:n, : table.shape[1]], self.lengths[:n], self.starts[: n + 1] = table, lengths, starts
        self.starts[n + 1 :] = tokens
        self.slots.fill_(-1)[:tokens] = 1
        for mine, theirs in ((self.k, world.k), (self.v, world.v), (self.q, world.q)):
            mine.fill_(float("nan"))
            mine[:tokens] = torch.cat([theirs[r][len(theirs[r]) - world.news[r] :] for r in order])
        self.out.fill_(float("nan"))
        self.pages[: len(world.before)] = world.before
        return tokens


@pytest.mark.parametrize("defer", [False, True])
@pytest.mark.parametrize(("preset", "head_dim"), FEW_SHAPES)
def test_replay_with_other_steps(preset, head_dim, defer):
    layout = kvarn.Layout(preset, head_dim, 2)
    cases = [
        ([300, 40, 129, 1, 2000], [1, 1, 1, 1, 1]), ([5, 4000], [5, 3]), ([128, 256, 64], [1, 4, 2]), ([7000], [6]),
        ([130] * 8, [3] * 8),
    ]  # fmt: skip
    worlds = [World(layout, lengths, news, 4, seed=i) for i, (lengths, news) in enumerate(cases)]
    count = max(pages_of(layout, world.lengths) + 1 for world in worlds)
    width = max(max(map(len, world.tables)) for world in worlds)
    fixed = Buffers(layout, 8, 8, width, 4, count, defer)
    fixed.fill(worlds[0], list(range(5)))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # warm-up, as torch asks for
        fixed.step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fixed.step()
    for i in (1, 0, 2, 3, 4, 1):
        world, order = worlds[i], list(range(len(worlds[i].lengths)))[::-1]
        tokens = fixed.fill(world, order)
        graph.replay()
        graph.replay()  # the same step again: appending it again changes nothing
        expected = world.run(order, options=_scaled())
        assert_same_bits(fixed.out[:tokens], torch.cat([expected[r] for r in order]), f"case {i}")
        assert (fixed.out[tokens:] == 0).all(), "rows that are nobody's are zeros"
        assert torch.equal(fixed.pages[: len(world.pages)], world.pages)


def _scaled():
    from gpu import Options

    return Options(scale=0.1)


def compiled_step(layout, space, pages, table, lengths, starts, k, v, q, out):
    k, v = k * 2, v + 1
    plan = kvarn.plan(
        layout, table, lengths, starts, tokens=q.shape[0], query_heads=q.shape[1], defer=True, workspace=space
    )
    kvarn.append(layout, pages, table, lengths, starts, k, v, plan=plan)
    attended = kvarn.attend(layout, pages, table, lengths, starts, q * 0.5, scale=0.1, out=out, plan=plan)
    kvarn.cuda.pack(plan, kvarn.cuda.Layers(layout, [pages]))
    return attended * 2


def test_torch_compile_sees_one_graph():
    layout = kvarn.Layout(*MAIN, 2)
    world = World(layout, [300, 40, 256], [1, 2, 5])
    order = [0, 1, 2]
    step = world.step(order)
    k, v, q = (torch.cat([x[r][len(x[r]) - world.news[r] :] for r in order]) for x in (world.k, world.v, world.q))
    results = []
    for function in (compiled_step, torch.compile(compiled_step, fullgraph=True)):
        space, pages, out = workspace(layout, 64, 4), world.before.clone(), torch.full_like(q, float("nan"))
        result = function(layout, space, pages, *step, k, v, q, out)
        results.append((pages, out, result))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)
    assert torch.isfinite(results[0][2]).all()


def test_operators_pass_torchs_own_checks():
    layout = kvarn.Layout(*MAIN, 2)
    world = World(layout, [300, 40], [1, 2])
    table, lengths, starts = world.step([0, 1])
    k, v, q = (torch.cat([x[r][len(x[r]) - world.news[r] :] for r in (0, 1)]) for x in (world.k, world.v, world.q))
    space = workspace(layout, 16, 2, max_seq_len=512, ctas=8)
    shared = [list(space.limits), layout.preset, layout.head_dim, layout.kv_heads, table, lengths, starts, None]
    ops, utils = torch.ops.kvarn, ["test_schema", "test_faketensor"]
    pages, out = world.before.clone(), torch.zeros_like(q)
    torch.library.opcheck(ops.plan.default, (space.tensor, *shared, 3, 2, 8, 0, True), test_utils=utils)
    ops.plan(space.tensor, *shared, 3, 2, 8, 0, True)
    fed = torch.zeros(2, layout.head_dim, layout.head_dim, device=DEVICE)
    for b, balance in ((None, None), (fed, torch.ones(2, layout.head_dim, device=DEVICE))):
        append = (pages, space.tensor, *shared, 2, k, v, True, "weighted", b, balance, None)
        torch.library.opcheck(ops.append.default, append, test_utils=utils)
        attend = (pages, space.tensor, *shared, 2, q, out, 0.1, 0.0, 0, None, balance)
        torch.library.opcheck(ops.attend.default, attend, test_utils=utils)
        pack = ([pages], space.tensor, *shared, 3, 2, "weighted", [b])
        torch.library.opcheck(ops.pack.default, pack, test_utils=utils)
    k_out, v_out = (torch.zeros(256, 2, layout.head_dim, device=DEVICE) for _ in "kv")
    plain = (pages, layout.preset, layout.head_dim, layout.kv_heads, table, lengths, k_out, v_out)
    torch.library.opcheck(ops.expand.default, plain, test_utils=utils)
    torch.library.opcheck(ops.rotate.default, (random((3, 2, layout.head_dim), 1),), test_utils=utils)


def test_nothing_waits_for_the_device():
    layout = kvarn.Layout(*MAIN, 2)
    world = World(layout, [300, 40], [1, 2])
    step, space, pages = world.step([0, 1]), workspace(layout, 16, 2), world.before.clone()
    k, v, q = (torch.cat([x[r][len(x[r]) - world.news[r] :] for r in (0, 1)]) for x in (world.k, world.v, world.q))
    out, sides = torch.empty_like(q), [torch.empty(256, 2, layout.head_dim, device=DEVICE) for _ in "kv"]

    def verbs():
        plan = kvarn.plan(layout, *step, tokens=3, query_heads=8, max_query_len=2, defer=True, workspace=space)
        kvarn.append(layout, pages, *step, k, v, plan=plan)
        kvarn.attend(layout, pages, *step, q, scale=0.1, out=out, plan=plan)
        kvarn.cuda.pack(plan, kvarn.cuda.Layers(layout, [pages]))
        kvarn.expand(layout, pages, *step[:2], out=sides)
        kvarn.rotate(q)

    verbs()  # CUDA loads kernels when they are first used, and waits for that
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")  # torch's own waits are found; ours would stall behind the sleep below
    try:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        torch.cuda._sleep(2_000_000_000)
        verbs()
        end.record()
        assert not end.query(), "a call waited for the device"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert torch.isfinite(out).all() and ints([1]).item() == 1
