"""Rubbish in pages, empty steps, and any mixture of arguments: an answer or an error, never a crash."""

import kvarn
import numpy as np
import pytest
from cases import ENCODERS, TARGETS, Step, disjoint_tables, hashed, pool
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_hostile import LAYOUT, arguments


def test_nothing_to_do_is_fine():
    empty = Step.of([], [], [])
    pages, none = pool(LAYOUT, 3), np.zeros((0, 2, 64), np.float32)
    assert kvarn.append(LAYOUT, pages, *empty, none, none) == 0
    assert kvarn.attend(LAYOUT, pages, *empty, none, scale=1.0).shape == (0, 2, 64)
    assert [side.shape for side in kvarn.expand(LAYOUT, pages, empty.block_table, empty.seq_lens)] == [(0, 2, 64)] * 2
    absent = Step.of([[]], [0], [3])
    rows = np.full((3, 2, 64), np.nan, np.float32)
    before = pages.copy()
    assert kvarn.append(LAYOUT, pages, *absent, rows, rows) == 0, "what takes no part is not replaced"
    assert np.array_equal(pages, before)
    assert not kvarn.attend(LAYOUT, pages, *absent, rows, scale=1.0).any()
    assert kvarn.append(LAYOUT, pages[:0], *absent, rows, rows) == 0


def rubbish(pages, seed, flips):
    """Pages with `flips` random bits turned, or all random where flips is None; scales may become NaN or infinite."""
    random = np.random.default_rng(seed)
    if flips is None:
        return random.integers(0, 256, pages.shape, dtype=np.uint8)
    out = pages.copy()
    where = random.integers(0, pages.size, flips)
    out.reshape(-1)[where] ^= np.uint8(1) << random.integers(0, 8, flips).astype(np.uint8)
    return out


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("flips", [1, 1000, None])
@pytest.mark.parametrize("preset", ["kvarn_k4v2_g64", "kvarn_k3v8_g128"])
def test_rubbish_in_pages_does_no_harm(preset, flips, target):
    """A defined result for any bytes; a request whose pages are sound keeps every bit."""
    layout = kvarn.Layout(preset, 64, 2)
    tables, count = disjoint_tables(layout, [300, 300])
    step = Step.of(tables, [300, 300], [1, 1])
    whole = Step.of(tables, [300, 300], [300, 300])
    k, v, q = (hashed((600, heads, 64), heads) for heads in (2, 3, 4))
    sound = pool(layout, count)
    kvarn.append(layout, sound, *whole, k, v[:, :2], target=target)
    expected = kvarn.attend(layout, sound, *step, q[:2], scale=0.125, target=target)
    for seed in range(10):
        pages = sound.copy()
        pages[tables[1]] = rubbish(sound[tables[1]], seed, flips)
        for cap in (0.0, 5.0):
            out = kvarn.attend(layout, pages, *step, q[:2], scale=0.125, soft_cap=cap, target=target)
            assert cap or np.array_equal(out[0], expected[0])
        kvarn.expand(layout, pages, step.block_table, step.seq_lens, target=target)
        for encoder in ENCODERS:  # packs a tile whose older raw tokens are rubbish
            grown = Step.of(tables, [300, 390], [1, 90])
            grown.block_table = np.pad(grown.block_table, ((0, 0), (0, 2)), constant_values=tables[1][0])
            kvarn.append(layout, pages, *grown, k[:91], v[:91, :2], encoder=encoder, target=target)
            kvarn.attend(layout, pages, *grown, q[:91], scale=0.125, target=target)


numbers = st.one_of(st.integers(-2, 200), st.sampled_from([-(2**31), 2**31 - 1, 2**20]))
axes = st.lists(st.sampled_from([0, 1, 2, 3, 4, 7, 63, 64, 65, 150, LAYOUT.page_bytes]), max_size=4)
kinds = st.sampled_from(["uint8", "int32", "float32", "float16", "int64", "float64"])
arrays = st.builds(
    lambda shape, kind: np.zeros(shape if np.prod(shape, dtype=float) < 1e7 else shape[:1], kind), axes, kinds
)


@settings(max_examples=250, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_mixture_of_arguments_is_answered(data):
    """Valid arguments of which some are replaced by arrays of any shape and dtype, or hold any integers."""
    verb = data.draw(st.sampled_from(["append", "attend", "expand"]))
    given = arguments(verb)
    for name in data.draw(
        st.sets(st.sampled_from([name for name in given if name not in ("layout", "scale")]), max_size=3)
    ):
        if given[name].dtype == np.int32 and data.draw(st.booleans()):
            for _ in range(data.draw(st.integers(1, 3))):
                given[name].reshape(-1)[data.draw(st.integers(0, given[name].size - 1))] = data.draw(numbers)
        else:
            given[name] = data.draw(arrays)
    try:
        getattr(kvarn, verb)(**given)
    except (ValueError, TypeError, IndexError) as error:
        assert str(error)
