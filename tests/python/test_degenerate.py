"""Inputs at the edge of the numbers: defined records on every target, finite rows, and no way from token to token."""

import kvarn
import numpy as np
import pytest
from cases import ENCODERS, TARGETS, Step, assert_same_pages, disjoint_tables, hashed, pool
from kvarn import reference
from kvarn.reference.arithmetic import hadamard

PRESETS = ["kvarn_k4v2_g128", "kvarn_k2v4_g64", "kvarn_k8v3_g64", "kvarn_k2v2_g128"]
TINY = np.float32(2.0**-24)  # the smallest binary16


def spike(value, channels=slice(9, 10)):
    x = hashed((128, 1, 64), 5)
    x[17, 0, channels] = value
    return x


def unrotated(value):
    """Input whose rotated form is `value`, [128][1][64] (exact where value is a multiple of a small power of two)."""
    return hadamard(np.broadcast_to(np.asarray(value, np.float32), (128, 1, 64)).copy())


def signs(seed):
    return np.where(hashed((128, 1, 64), seed) < 0, np.float32(-1), np.float32(1))


def zeros_of_both_signs():
    return signs(7) * np.float32(0)


INPUTS = {
    "zeros": lambda: np.zeros((128, 1, 64), np.float32),
    "negative zeros": lambda: -np.zeros((128, 1, 64), np.float32),
    "zeros of both signs": zeros_of_both_signs,
    "constant": lambda: np.full((128, 1, 64), 3.25, np.float32),
    "constant after rotation": lambda: unrotated(-1.5),
    "constant channels after rotation": lambda: unrotated(np.arange(64) / 8 - 4),
    "constant tokens after rotation": lambda: unrotated((np.arange(128) / 16 - 4)[:, None, None]),
    "one token alone": lambda: np.where(np.arange(128)[:, None, None] == 70, hashed((128, 1, 64), 1), np.float32(0)),
    "one outlier": lambda: spike(6e4),
    "one outlier token": lambda: spike(6e4, slice(None)),
    "outliers that cancel": lambda: np.where(np.arange(128)[:, None, None] < 64, 6e4, -6e4).astype(np.float32)
    * np.ones((128, 1, 64), np.float32),
    "largest everywhere": lambda: signs(3) * np.float32(65504),
    "smallest everywhere": lambda: signs(3) * TINY,
    "smallest after rotation": lambda: unrotated(signs(3) * TINY),
    "smallest and zero after rotation": lambda: unrotated(np.where(signs(3) > 0, TINY, np.float32(0))),
    "binary32 denormals": lambda: hashed((128, 1, 64), 4) * np.float32(1e-40),
    "denormals and an outlier": lambda: np.where(spike(0) == 0, np.float32(6e4), hashed((128, 1, 64), 4) * TINY),
    "two values after rotation": lambda: unrotated(np.where(signs(8) > 0, 1.0, 2.0)),
    "tokens from tiny to huge": lambda: hashed((128, 1, 64), 2) * np.exp2(np.arange(128) / 5 - 16)[:, None, None],
    "NaN": lambda: spike(np.nan),
    "a token of NaN": lambda: spike(np.nan, slice(None)),
    "infinity": lambda: spike(np.inf),
    "minus infinity": lambda: spike(-np.inf),
    "both infinities and NaN": lambda: np.select([spike(0) > 1.5, spike(0) < -1.5], [np.nan, -np.inf], spike(np.inf)),
    "beyond binary16": lambda: spike(1e30),
    "only NaN": lambda: np.full((128, 1, 64), np.nan, np.float32),
    "only infinity": lambda: np.full((128, 1, 64), np.inf, np.float32),
}  # fmt: skip


def fill(verbs, layout, k, v, **options):
    tables, count = disjoint_tables(layout, [130])
    tokens, pages = len(k), pool(layout, count)
    step = Step.of(tables, [tokens], [tokens])
    replaced = verbs.append(layout, pages, *step, k, v, **options)
    return pages, step, replaced


def expected_replaced(*inputs):
    return sum(int(np.count_nonzero(~(np.abs(x) <= 65504))) for x in inputs)


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("name", INPUTS)
def test_records_are_defined_and_rows_finite(name, encoder):
    special, plain = INPUTS[name]().astype(np.float32), hashed((128, 1, 64), 11)
    for preset in PRESETS:
        layout = kvarn.Layout(preset, 64, 1)
        for k, v in ((special, special), (special, plain), (plain, special)):
            expected, _, replaced = fill(reference, layout, k, v, encoder=encoder)
            assert replaced == expected_replaced(k, v)
            for target in TARGETS:
                pages, step, replaced = fill(kvarn, layout, k, v, encoder=encoder, target=target)
                assert replaced == expected_replaced(k, v)
                assert_same_pages(layout, pages, expected, f"{name}, {preset}, {encoder}, {target}")
                out = kvarn.attend(layout, pages, *step, hashed((128, 2, 64), 12), scale=0.125, target=target)
                assert np.isfinite(out).all()
                for side in kvarn.expand(layout, pages, step.block_table, step.seq_lens, target=target):
                    assert np.isfinite(side).all()


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("value", [0.0, 3.25])
def test_flat_tiles_decode_to_themselves(value, encoder):
    """A constant tile is as good as exact: its rotated form is one channel per block, the rest 0."""
    layout, x = kvarn.Layout("kvarn_k4v2_g128", 64, 1), np.full((128, 1, 64), value, np.float32)
    pages, step, _ = fill(kvarn, layout, x, x, encoder=encoder)
    for side in kvarn.expand(layout, pages, step.block_table, step.seq_lens):
        assert np.abs(side - reference.rotate(x)).max() <= value * 8 * 2e-3


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 6e4])
def test_a_bad_token_stays_in_its_tile(bad, target):
    """NaN, infinity or an outlier in tile 1: the other tiles and raw tokens keep every byte; rows stay finite."""
    layout, tokens = kvarn.Layout("kvarn_k4v2_g64", 64, 2), 200
    k, v = hashed((tokens, 2, 64), 1), hashed((tokens, 2, 64), 2)
    tables, count = disjoint_tables(layout, [tokens])
    step, pools = Step.of(tables, [tokens], [tokens]), []
    for spoilt in (False, True):
        if spoilt:
            k[100, 1, 3], v[101, 0, 60] = bad, bad
        pools.append(pool(layout, count))
        replaced = kvarn.append(layout, pools[-1], *step, k, v, target=target)
        assert replaced == (2 if spoilt and not abs(bad) <= 65504 else 0)
        out = kvarn.attend(layout, pools[-1], *step, hashed((tokens, 2, 64), 3), scale=0.125, target=target)
        assert np.isfinite(out).all()
    changed = np.unique(np.nonzero(pools[0] != pools[1])[0])
    assert changed.tolist() in ([], [tables[0][1]]), "only the page of tile 1 may change"


@pytest.mark.parametrize("target", TARGETS)
def test_a_bad_query_stays_in_its_row(target):
    layout, tokens = kvarn.Layout("kvarn_k4v2_g64", 64, 1), 150
    tables, count = disjoint_tables(layout, [tokens])
    step, pages, q = Step.of(tables, [tokens], [tokens]), pool(layout, count), hashed((tokens, 4, 64), 3)
    kvarn.append(layout, pages, *step, hashed((tokens, 1, 64), 1), hashed((tokens, 1, 64), 2), target=target)
    good = kvarn.attend(layout, pages, *step, q, scale=0.125, target=target)
    for bad in (np.nan, np.inf, -np.inf):
        spoilt = q.copy()
        spoilt[140, 2, 7] = bad
        out = kvarn.attend(layout, pages, *step, spoilt, scale=0.125, target=target)
        assert np.isnan(out[140, 2]).all()
        out[140, 2] = good[140, 2]
        assert np.array_equal(out, good)
    out = kvarn.attend(layout, pages, *step, q * np.float32(1e30), scale=0.125, target=target)
    assert np.isfinite(out).all() or np.isnan(out).any(), "huge queries: a defined result, no crash"


def test_dtypes_carry_the_same_special_values():
    """NaN and infinity in half precision are replaced like those in fp32."""
    import torch

    layout, x = kvarn.Layout("kvarn_k4v2_g128", 64, 1), INPUTS["both infinities and NaN"]().astype(np.float32)
    x = np.where(np.isfinite(x), np.float32(0.5), x)
    pages = []
    for kind in (
        x,
        x.astype(np.float16),
        torch.from_numpy(x),
        torch.from_numpy(x).bfloat16(),
        torch.from_numpy(x).half(),
    ):
        filled, _, replaced = fill(kvarn, layout, kind, kind)
        assert replaced == expected_replaced(x, x)
        pages.append(filled)
    for other in pages[1:]:
        assert_same_pages(layout, other, pages[0])
