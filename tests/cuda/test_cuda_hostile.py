# SPDX-License-Identifier: Apache-2.0
"""Wrong arguments are refused on the host; wrong tables and lengths on the device fault nothing, hurt nobody else."""

import kvarn
import numpy as np
import pytest
import torch
from gpu import DEVICE, MAIN, World, assert_same_bits, ints, random, workspace

REFUSED = (TypeError, ValueError)


def arguments(verb):
    layout = kvarn.Layout(*MAIN, 2)
    world = World(layout, [300, 40], [2, 3])
    table, lengths, starts = world.step([0, 1])
    k, v, q = (torch.cat([x[r][len(x[r]) - world.news[r] :] for r in (0, 1)]) for x in (world.k, world.v, world.q))
    given = dict(layout=layout, pages=world.before, block_table=table, seq_lens=lengths)
    if verb != "expand":
        given |= dict(query_starts=starts)
    if verb == "append":
        given |= dict(k=k, v=v)
    if verb == "attend":
        kvarn.append(layout, world.before, table, lengths, starts, k, v)
        given |= dict(q=q, scale=0.1)
    return given


def wide(x):
    return torch.stack([x, x], -1)[..., 0]


CHANGES = [
    *((verb, "pages", change, classes) for verb in ("append", "attend", "expand") for change, classes in (
        (lambda x: x[:0], ValueError), (lambda x: x[:, :-16], ValueError), (lambda x: x.float(), TypeError),
        (lambda x: x[0], ValueError), (lambda x: x.to(torch.int8), TypeError),
    )),
    *((verb, "block_table", change, REFUSED) for verb in ("append", "attend", "expand") for change in (
        lambda x: None, lambda x: x.cpu(), lambda x: x.cpu().numpy(), lambda x: x.long(), lambda x: x[0], wide,
    )),
    *((verb, "seq_lens", change, REFUSED) for verb in ("append", "attend", "expand") for change in (
        lambda x: None, lambda x: x.cpu(), lambda x: x.long(), lambda x: x[:1], lambda x: x[None], wide,
    )),
    *((verb, "query_starts", change, REFUSED) for verb in ("append", "attend") for change in (
        lambda x: None, lambda x: x.cpu(), lambda x: x.long(), lambda x: x[:-1], wide,
    )),
    *(("append", name, change, REFUSED) for name in "kv" for change in (
        lambda x: None, lambda x: x.cpu(), lambda x: x.cpu().numpy(), lambda x: x.double(), lambda x: x.int(),
        lambda x: x[:, :1], lambda x: x[..., :64], lambda x: x[0], wide,
    )),
    ("append", "v", lambda x: x[:-1], ValueError),
    *(("attend", "q", change, REFUSED) for change in (
        lambda x: None, lambda x: x.cpu(), lambda x: x.double(), lambda x: x[:, :3], lambda x: x[:, :1],
        lambda x: x[..., :32], wide, lambda x: torch.cat([x] * 5, 1),
    )),
    ("attend", "scale", lambda x: float("nan"), ValueError), ("attend", "scale", lambda x: "0.1", TypeError),
    ("append", "layout", lambda x: "kvarn_k4v2_g128", TypeError),
    ("append", "layout", lambda x: kvarn.Layout("kvarn_k3v2_g128", 128, 2), ValueError),
    ("append", "layout", lambda x: kvarn.Layout("kvarn_k4v2_g128", 80, 2), ValueError),
]  # fmt: skip


@pytest.mark.parametrize(("verb", "name", "change", "classes"), [
    pytest.param(*c, id=f"{c[0]}-{c[1]}-{i}") for i, c in enumerate(CHANGES)
])  # fmt: skip
def test_refused(verb, name, change, classes):
    given = arguments(verb)
    before, original = given["pages"].clone(), given["pages"]
    given[name] = change(given[name])
    with pytest.raises(classes) as caught:
        getattr(kvarn, verb)(**given)
    assert len(str(caught.value)) > 10
    torch.cuda.synchronize()
    assert torch.equal(original, before)


OPTIONS = [
    ("append", dict(encoder="unknown"), ValueError), ("append", dict(target="avx2"), ValueError),
    ("append", dict(slots=torch.zeros(5, dtype=torch.int64)), REFUSED), ("append", dict(slots=3), TypeError),
    ("append", dict(plan=3), TypeError), ("append", dict(workspace=3), TypeError),
    ("append", dict(replaced=3), TypeError), ("append", dict(replaced=torch.zeros(1)), REFUSED),
    ("attend", dict(soft_cap=-1.0), ValueError), ("attend", dict(window=-1), ValueError),
    ("attend", dict(sinks=torch.zeros(8)), REFUSED), ("attend", dict(sinks=[0.0] * 8), TypeError),
    ("attend", dict(out=torch.zeros(5, 8, 128)), REFUSED), ("attend", dict(target="scalar"), ValueError),
    ("expand", dict(dtype=torch.int32), TypeError), ("expand", dict(out=3), REFUSED),
    ("expand", dict(target="avx2"), ValueError),
]  # fmt: skip


@pytest.mark.parametrize(("verb", "options", "classes"), [
    pytest.param(*o, id=f"{o[0]}-{next(iter(o[1]))}-{i}") for i, o in enumerate(OPTIONS)
])  # fmt: skip
def test_refused_options(verb, options, classes):
    with pytest.raises(classes) as caught:
        getattr(kvarn, verb)(**(arguments(verb) | options))
    assert len(str(caught.value)) > 10


def test_refused_feedback():
    head_dim = MAIN[1]
    zeros = torch.zeros(2, head_dim, head_dim, device=DEVICE)
    for feedback in (
        3,
        np.zeros((2, head_dim, head_dim), np.float32),
        zeros.cpu(),
        zeros.half(),
        zeros[:1],
        torch.zeros(2, head_dim, 2 * head_dim, device=DEVICE)[..., ::2],
        torch.zeros(zeros.numel() + 1, device=DEVICE)[1:].view_as(zeros),
    ):
        with pytest.raises(REFUSED) as caught:
            kvarn.append(**arguments("append"), feedback=feedback)
        assert len(str(caught.value)) > 10
    with pytest.raises(ValueError, match="varnorm"):
        kvarn.append(**arguments("append"), feedback=zeros, encoder="varnorm")


def test_refused_balance():
    ones = torch.ones(2, MAIN[1], device=DEVICE)
    for balance in (
        3,
        ones.cpu(),
        ones.double(),
        ones[:1],
        ones.flatten(),
        torch.ones(MAIN[1], 2, device=DEVICE).T,
        torch.ones(ones.numel() + 1, device=DEVICE)[1:].view_as(ones),
    ):
        for verb in ("append", "attend"):
            with pytest.raises(REFUSED) as caught:
                getattr(kvarn, verb)(**arguments(verb), balance=balance)
            assert "balance" in str(caught.value)


def test_plans_are_for_one_layout_window_and_heads():
    given = arguments("attend")
    layout, tables = given["layout"], (given["block_table"], given["seq_lens"], given["query_starts"])
    plan = kvarn.plan(layout, *tables, tokens=5, query_heads=8, workspace=workspace(layout, 16, 2, 8))
    kvarn.attend(**given, plan=plan)
    for change in (
        dict(window=5),
        dict(q=given["q"][:, :4]),
        dict(q=given["q"][:4]),
        dict(workspace=workspace(layout)),
    ):
        with pytest.raises(ValueError):
            kvarn.attend(**(given | change), plan=plan)
    with pytest.raises(ValueError, match="made for"):
        kvarn.plan(layout, *tables, tokens=17, query_heads=8, workspace=plan.workspace)
    with pytest.raises(ValueError, match="made for"):
        kvarn.plan(layout, *tables, tokens=5, query_heads=16, workspace=plan.workspace)
    with pytest.raises(ValueError, match="made for"):
        kvarn.plan(kvarn.Layout(*MAIN, 4), *tables, tokens=5, workspace=plan.workspace)
    short = kvarn.CudaWorkspace.__new__(kvarn.CudaWorkspace)
    short.layout, short.limits, short.tensor = layout, plan.workspace.limits, plan.workspace.tensor[:-256]
    with pytest.raises(ValueError, match="bytes"):
        kvarn.plan(layout, *tables, tokens=5, workspace=short)


@pytest.mark.parametrize("given", [
    (-1, 1, 8, 100), (1, -1, 8, 100), (1, 1, 3, 100), (1, 1, 34, 100), (1, 1, 8, -1), (2**31, 1, 8, 100),
    (1, 1, 8, 2**40),
])  # fmt: skip
def test_workspaces_that_cannot_be(given):
    with pytest.raises(REFUSED):
        kvarn.CudaWorkspace(kvarn.Layout(*MAIN, 2), *given)


def corrupt(name, value):
    def change(world, table, lengths, starts):
        {"block_table": table[1], "seq_lens": lengths[1:2], "query_starts": starts[2:3]}[name].fill_(value)

    return pytest.param(change, id=f"{name}={value}")


@pytest.mark.parametrize("change", [
    *(corrupt("block_table", value) for value in (-1, 10**6, 2**31 - 1, -(2**31))),
    *(corrupt("seq_lens", value) for value in (-1, 0, 1, 2**31 - 1, -(2**31), 10**6, 10**8)),
    *(corrupt("query_starts", value) for value in (0, 1, -1, 2**31 - 1, -(2**31), 10**6)),
])  # fmt: skip
def test_corrupt_device_memory_hurts_its_own_request_only(change):
    """Request 1 is corrupted. Nothing faults, and requests 0 and 2 get the bits they always got."""
    world = World(kvarn.Layout(*MAIN, 2), [300, 600, 129], [2, 3, 1])
    expected, layout = world.run(), world.layout
    table, lengths, starts = world.step([0, 1, 2])
    change(world, table, lengths, starts)
    k, v, q = (torch.cat([x[r][len(x[r]) - world.news[r] :] for r in (0, 1, 2)]) for x in (world.k, world.v, world.q))
    pages = torch.cat(
        [world.before, world.before[:1], world.before[:1]]
    )  # whom a clamped index may hit: nobody's pages
    pages = torch.cat([pages[-1:], pages])
    table[[0, 2]] += 1
    plan = kvarn.plan(
        layout, table, lengths, starts, tokens=6, query_heads=8, max_query_len=3, workspace=workspace(layout, 16, 4)
    )
    out = torch.full_like(q, float("nan"))
    kvarn.append(layout, pages, table, lengths, starts, k, v, plan=plan)
    kvarn.attend(layout, pages, table, lengths, starts, q, scale=layout.head_dim**-0.5, out=out, plan=plan)
    kvarn.expand(
        layout, pages, table, lengths, out=[torch.empty(2048, 2, layout.head_dim, device=DEVICE) for _ in "kv"]
    )
    torch.cuda.synchronize()
    assert_same_bits(out[:2], expected[0], "request 0")
    if int(starts[2]) == 5:
        assert_same_bits(out[5:], expected[2], "request 2")


def test_random_pages_give_results_not_faults():
    world = World(kvarn.Layout(*MAIN, 2), [300, 1600, 129], [2, 3, 1])
    for seed in range(5):
        world.before.copy_(random(world.before.shape, seed, std=200).to(torch.int32).to(torch.uint8))
        world.run()
    torch.cuda.synchronize()


def test_empty_steps():
    layout = kvarn.Layout(*MAIN, 2)
    world = World(layout, [5], [1])
    table, none, starts = torch.zeros(0, 3, dtype=torch.int32, device=DEVICE), ints([]), ints([0])
    rows = random((0, 2, layout.head_dim), 1)
    kvarn.append(layout, world.before, table, none, starts, rows, rows)
    assert kvarn.attend(layout, world.before, table, none, starts, rows, scale=1.0).shape == rows.shape
    assert kvarn.expand(layout, world.before, table, none)[0].shape == rows.shape
    assert kvarn.rotate(rows).shape == rows.shape
    q = random((4, 4, layout.head_dim), 1)
    assert (kvarn.attend(layout, world.before, table, none, starts, q, scale=1.0) == 0).all()
    assert np.prod(kvarn.expand(layout, world.before, *world.step([0])[:2])[0].shape) == 0
