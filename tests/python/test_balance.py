"""append and attend with a balance: what they do on keys divided and queries multiplied, exactly; kvarn.energy."""

import kvarn
import numpy as np
import pytest
import torch
from cases import Step, assert_same_pages, disjoint_tables, hashed, pool
from kvarn import energy, reference

LAYOUT = kvarn.Layout("kvarn_k2v2_g128", head_dim=64, kv_heads=2)
TOKENS, GROUP = 300, 3
BALANCE = np.exp2(np.clip(np.round(hashed((2, 64), 5)), -2, 2)).astype(np.float32)


def step(balance=None, divide=1.0, multiply=1.0, dtype=torch.float32, device="cpu"):
    """Pages after one step of 300 tokens, and attention of it."""
    tables, count = disjoint_tables(LAYOUT, [TOKENS])
    pages, its = pool(LAYOUT, count), Step.of(tables, [TOKENS], [TOKENS])
    k, v = (torch.from_numpy(hashed((TOKENS, 2, 64), seed)).to(device, dtype) for seed in (1, 2))
    q = torch.from_numpy(hashed((TOKENS, 2 * GROUP, 64), 3)).to(device, dtype)
    batch = [torch.from_numpy(np.asarray(x)).to(device) for x in (pages, *its)]
    kvarn.append(LAYOUT, *batch, k / divide, v, balance=balance)
    out = kvarn.attend(LAYOUT, *batch, q * multiply, scale=0.125, balance=balance)
    return batch[0], out


def assert_as_by_hand(dtype, device):
    """Keys divided and queries multiplied before: exact in the rows' dtype, too, whose range is enough here."""
    how = {"dtype": dtype, "device": device}
    balance = torch.from_numpy(BALANCE).to(device)
    by_hand = step(divide=balance.to(dtype), multiply=balance.to(dtype).repeat_interleave(GROUP, 0), **how)
    for ours, theirs in zip(step(balance, **how), by_hand, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def test_the_range_of_the_rows_does_not_limit_it():
    """Halves of which a 1,024th has no halves: divided in float32, they are not flushed to zero."""
    k = torch.full((TOKENS, 2, 64), 2.0**-20).half()
    tables, count = disjoint_tables(LAYOUT, [TOKENS])
    found = []
    for given, balance in ((k, torch.full((2, 64), 2.0**10)), (k.float() * 2.0**-10, None)):
        pages, its = pool(LAYOUT, count), Step.of(tables, [TOKENS], [TOKENS])
        batch = [torch.from_numpy(np.asarray(x)) for x in (pages, *its)]
        kvarn.append(LAYOUT, *batch, given, given, balance=balance)
        found.append(kvarn.expand(LAYOUT, *batch[:3])[0])
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_it_divides_keys_and_multiplies_queries(dtype):
    assert_as_by_hand(dtype, "cpu")


@pytest.mark.gpu
def test_on_a_gpu():
    if missing := kvarn.cuda_missing():
        pytest.skip(missing)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert_as_by_hand(dtype, "cuda")


def test_arrays_tensors_and_the_reference_alike():
    tables, count = disjoint_tables(LAYOUT, [TOKENS])
    k, v, q = (hashed((TOKENS, heads, 64), seed) for heads, seed in ((2, 1), (2, 2), (2 * GROUP, 3)))
    found = []
    for verbs, layout in ((kvarn, LAYOUT), (reference, reference.Layout("kvarn_k2v2_g128", 64, 2))):
        pages, its = pool(LAYOUT, count), Step.of(tables, [TOKENS], [TOKENS])
        verbs.append(layout, pages, *its, k, v, balance=BALANCE)
        found.append((pages, verbs.attend(layout, pages, *its, q, scale=0.125, balance=BALANCE)))
    ours, theirs = found
    assert_same_pages(LAYOUT, ours[0], theirs[0], "numpy")
    assert np.linalg.norm(ours[1] - theirs[1]) < 1e-3 * np.linalg.norm(theirs[1])
    pages, out = step(torch.from_numpy(BALANCE))
    assert (pages.numpy() == ours[0]).all() and (out.numpy() == ours[1]).all()


def test_products_do_not_change():
    """The first tile is raw: f16 of other magnitudes, rotated, is all that differs."""
    ours, plain = step(torch.from_numpy(BALANCE))[1][:128], step()[1][:128]
    assert (ours - plain).norm() < 5e-3 * plain.norm()


def test_another_shape_is_refused():
    for wrong in (torch.ones(2, 128), torch.ones(3, 64)):
        with pytest.raises(ValueError, match=r"balance has shape .*; it must have \[2, 64\]"):
            step(wrong)
    with pytest.raises(ValueError, match=r"balance has shape \[64\]; it must have 2 axes"):
        step(torch.ones(64))
    with pytest.raises(ValueError, match="balance must be contiguous"):
        step(torch.ones(64, 2).T)
    with pytest.raises(TypeError, match="balance must be float32"):
        step(torch.ones(2, 64, dtype=torch.float64))


def test_only_powers_of_two():
    for wrong in (0.0, -2.0, 3.0, float("inf"), float("nan")):
        balance = torch.ones(2, 64)
        balance[1, 7] = wrong
        with pytest.raises(ValueError, match=r"balance\[1\]\[7\] is .*; allowed: powers of two"):
            step(balance)


def test_it_is_how_far_keys_deviate():
    deviation = torch.tensor([1.0, 4.0, 0.25, 64.0]).repeat(16)
    keys = torch.tensor([-1.0, 1.0]).repeat(256)[:, None, None] * deviation.expand(2, 64)
    keys[:, :, 0] += 1024  # a large mean, which the record takes in: a 64th of it counts
    keys[:, :, 2] = 0
    found = energy.of_keys(keys)
    assert torch.equal(found, found.log2().round().exp2())
    ratios = found / found[:, 1:2]
    assert (ratios[:, 4:] * 4 == deviation[4:]).all() and (ratios[:, 0] == 4).all()
    assert (ratios[:, 2] == 2.0**-6).all(), "2^-10 of the most, 64"


def seen(keys) -> energy.Seen:
    draw = torch.Generator().manual_seed(4)
    return energy.Seen.of(torch.randn(512, 6, 64, generator=draw), keys)


def test_few_bits_have_every_channel_balanced_many_those_that_differ_much():
    deviation = torch.ones(64)
    deviation[:32], deviation[5] = 2, 64
    found = seen(torch.tensor([-1.0, 1.0]).repeat(256)[:, None, None] * deviation.expand(2, 64))
    for bits in (2, 3):
        assert torch.equal(found.feedback(bits).balance, found.keys)
    assert (found.keys[:, 32:] == 0.5).all() or (found.keys[:, :5] == 2).all()
    for bits in (4, 8):
        balance = found.feedback(bits).balance.clone()
        assert (balance[:, 5] == found.keys[:, 5]).all() and (balance[:, 5] >= 32).all()
        balance[:, 5] = 1
        assert (balance == 1).all()
    assert found.feedback(2) is found.feedback(3), "made once"


def test_feedback_is_for_queries_as_they_are_multiplied():
    draw = torch.Generator().manual_seed(5)
    keys = torch.randn(512, 2, 64, generator=draw)
    keys[..., 7] *= 16
    found = seen(keys)
    for bits in (2, 4):
        its, plain = found.feedback(bits), found.unbalanced().feedback(bits)
        assert plain.balance is None and torch.equal(plain.matrix, kvarn.feedback(found.queries))
        assert torch.equal(its.matrix, kvarn.feedback(found.queries * its.balance.square()))
