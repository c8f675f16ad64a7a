"""append with feedback: every target against the numpy reference to the byte, whatever the matrices; kvarn.feedback."""

from fractions import Fraction

import kvarn
import numpy as np
import pytest
import torch
from cases import TARGETS, Step, assert_same_pages, disjoint_tables, golden, hashed, pool
from kvarn import reference
from kvarn.reference.arithmetic import hadamard
from kvarn.reference.feedback import fused
from test_hostile import column_strided, misaligned

SHAPES = [
    ("kvarn_k4v2_g128", 128), ("kvarn_k2v2_g64", 64), ("kvarn_k8v4_g128", 96), ("kvarn_k3v3_g64", 80),
    ("kvarn_k4v4_g128", 256),
]  # fmt: skip


def matrices(heads, head_dim):
    return np.concatenate([golden.golden_feedback(head_dim) * (head + 1) for head in range(heads)])


def packed(verbs, layout, b, tokens=300, k_gain=1.0, **options):
    tables, count = disjoint_tables(layout, [tokens])
    pages, step = pool(layout, count), Step.of(tables, [tokens], [tokens])
    k, v = (hashed((tokens, layout.kv_heads, layout.head_dim), seed) for seed in (1, 2))
    verbs.append(layout, pages, *step, k * np.float32(k_gain), v, feedback=b, **options)
    return pages


def wild(b):
    b = b.copy()
    b[0, 3, 60], b[0, 5, 50], b[1, 7, 8], b[1, 0, 9], b[1, 2, 40] = np.nan, np.inf, -np.inf, 3e38, -1e30
    return b


@pytest.mark.parametrize("change", [lambda b: b, wild, lambda b: b * 1e4], ids=["plain", "wild", "huge"])
@pytest.mark.parametrize(("preset", "head_dim"), SHAPES)
def test_bytes_are_the_reference_s(preset, head_dim, change):
    b = change(matrices(2, head_dim))
    expected = packed(reference, reference.Layout(preset, head_dim, 2), b)
    layout = kvarn.Layout(preset, head_dim, 2)
    for target in TARGETS:
        assert_same_pages(layout, packed(kvarn, layout, b, target=target), expected, target)


def test_a_fused_multiply_add_rounds_once():
    a, b, c = (hashed((4000,), seed) * np.float32(1 + 2**-20) for seed in (1, 2, 3))
    c[:2000] = -(a[:2000] * b[:2000])  # what is left is the product's own rounding
    c[2000:3000] *= np.float32(2.0**-30)
    for x, y, z, got in zip(a.tolist(), b.tolist(), c.tolist(), fused(a, b, c), strict=True):
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        for side in (-np.inf, np.inf):
            near = float(np.nextafter(got, np.float32(side)))
            assert abs(exact - Fraction(float(got))) <= abs(exact - Fraction(near))


def test_without_and_with_nothing_to_feed_back():
    layout = kvarn.Layout("kvarn_k4v2_g128", 128, 2)
    nothing = np.tril(np.full((2, 128, 128), np.nan, np.float32))
    nothing[np.broadcast_to(np.triu(np.ones((128, 128), bool), 1), nothing.shape)] = 0
    assert np.array_equal(packed(kvarn, layout, None), packed(kvarn, layout, nothing))


def test_torch_matrices():
    layout, b = kvarn.Layout("kvarn_k4v2_g128", 64, 2), matrices(2, 64)
    assert np.array_equal(packed(kvarn, layout, torch.from_numpy(b)), packed(kvarn, layout, b))


@pytest.mark.parametrize(("change", "says"), [
    (lambda b: b.astype(np.float64), "float32"), (lambda b: b.astype(np.float16), "float32"), (lambda b: b[0], "axes"),
    (lambda b: b[:1], r"\[1, 64, 64\]"), (lambda b: b[:, :63], "63"), (lambda b: b[..., :63], "63"),
    (column_strided, "contiguous"), (lambda b: b[::-1], "contiguous"), (lambda b: b.swapaxes(1, 2), "contiguous"),
    (lambda b: misaligned(b, 2), "aligned"), (lambda b: np.zeros((0, 64, 64), np.float32), "shape"),
    (lambda b: "b", None),
])  # fmt: skip
def test_refused(change, says):
    layout = kvarn.Layout("kvarn_k4v2_g128", 64, 2)
    with pytest.raises((TypeError, ValueError), match=says):
        packed(kvarn, layout, change(matrices(2, 64)))


def test_varnorm_takes_none():
    for verbs, layout in ((kvarn, kvarn.Layout), (reference, reference.Layout)):
        with pytest.raises(ValueError, match="no feedback"):
            packed(verbs, layout("kvarn_k4v2_g128", 64, 2), matrices(2, 64), encoder="varnorm")


def energies(heads, head_dim):
    pairs = np.exp(2 * hashed((heads, head_dim // 2), 7).astype(np.float64))
    return np.concatenate([pairs, pairs], -1)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_feedback_is_the_triangle_of_the_second_moment(head_dim):
    energy = energies(3, head_dim)
    b = kvarn.feedback(energy)
    assert b.dtype == np.float32 and b.shape == (3, head_dim, head_dim) and b.flags.c_contiguous
    turn = hadamard(np.eye(head_dim))
    for matrix, e in zip(b, energy, strict=True):
        moment = turn @ np.diag(e) @ turn.T
        upper = np.linalg.cholesky(moment + 0.1 * np.trace(moment) / head_dim * np.eye(head_dim)).T
        assert np.allclose(matrix, np.triu(upper / np.diag(upper)[:, None], 1), rtol=0, atol=1e-6)


def test_feedback_keeps_kind_and_scale():
    energy = energies(2, 64)
    b = kvarn.feedback(energy)
    assert np.array_equal(kvarn.feedback(energy * 2.0**600), b)
    of_torch = kvarn.feedback(torch.from_numpy(energy))
    assert isinstance(of_torch, torch.Tensor) and np.array_equal(of_torch.numpy(), b)
    assert kvarn.feedback(torch.from_numpy(energy).bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("energy", [
    np.zeros((1, 64)), np.stack([np.ones(64), np.zeros(64)]), np.full((1, 64), np.nan), np.full((1, 64), np.inf),
    -np.ones((1, 64)), np.ones(64), np.ones((1, 1, 64)),
])  # fmt: skip
def test_feedback_refuses(energy):
    with pytest.raises(ValueError, match="energy"):
        kvarn.feedback(energy)


def test_it_serves_the_queries_it_was_made_for():
    """Less error in the scores of queries with that energy, at the same bytes."""
    layout, tokens, energy = kvarn.Layout("kvarn_k4v4_g128", 128, 1), 256, energies(1, 128)
    k = hashed((tokens, 1, 128), 1)
    q = hashed((500, 128), 3) * np.sqrt(energy)
    errors = []
    for b in (None, kvarn.feedback(energy)):
        pages = packed(kvarn, layout, b, tokens)
        table, length = np.array(disjoint_tables(layout, [tokens])[0], np.int32), np.array([tokens], np.int32)
        read = hadamard(kvarn.expand(layout, pages, table, length)[0][:, 0].astype(np.float64))
        errors.append(np.square(q @ (read - k[:, 0]).T).mean())
    assert errors[1] < 0.7 * errors[0], errors
