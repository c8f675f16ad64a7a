"""kvarn against the numpy reference: append and expand to the bit, attend within what its arithmetic can lose."""

import kvarn
import numpy as np
import pytest
import torch
from cases import (
    DOCUMENTED,
    DTYPES,
    EVERY_PRESET,
    HEAD_DIMS,
    TARGETS,
    Step,
    as_float32,
    assert_same_pages,
    cast,
    disjoint_tables,
    hashed,
    pool,
    verbs_of,
)
from kvarn import reference
from tolerance import assert_close

# Per step, for each of six requests: (tokens that stay from before, new tokens); None: takes no part, with two dummy
# rows. A tile is completed by one token, by drafts that are then rejected, by a chunk; edges of 64 and 128 are crossed.
RAGGED = [
    [(0, 1), (0, 127), (0, 128), (0, 129), None, (0, 333)],
    [(1, 1), (127, 8), (128, 1), (129, 64), (0, 60), (333, 200)],
    [(2, 3), (128, 4), (129, 20), None, (60, 1), (533, 1)],
    [(5, 140), (130, 1), (130, 130), (193, 2), (61, 9), (530, 17)],
]


def run(verbs, layout, *, dtype="float32", group=2, steps=RAGGED, encoder="weighted", soft_cap=0.0, gain=1.0):
    """Plays the steps: returns the pool after each step's append, each step's outputs, and expand at the end."""
    H, D = layout.kv_heads, layout.head_dim
    longest = [max([sum(step[r]) for step in steps if step[r]] + [0]) for r in range(len(steps[0]))]
    tables, count = disjoint_tables(layout, longest)
    pages, snapshots, outputs = pool(layout, count), [], []
    for index, step in enumerate(steps):
        lengths = [sum(part) if part else 0 for part in step]
        batch = Step.of(tables, lengths, [part[1] if part else 2 for part in step])
        tokens = int(batch.query_starts[-1])
        k, v = (cast(hashed((tokens, H, D), 10 * index + side), dtype) for side in (1, 2))
        q = cast(hashed((tokens, H * group, D), 10 * index + 3) * np.float32(gain), dtype)
        assert verbs.append(layout, pages, *batch, k, v, encoder=encoder) == 0
        snapshots.append(pages.copy())
        outputs.append(as_float32(verbs.attend(layout, pages, *batch, q, scale=D**-0.5, soft_cap=soft_cap)))
        for row, part in enumerate(step):
            if part is None:
                assert not outputs[-1][batch.query_starts[row] : batch.query_starts[row + 1]].any()
    return snapshots, outputs, verbs.expand(layout, pages, batch.block_table, batch.seq_lens)


def compare(preset, head_dim, heads=2, **options):
    expected = run(reference, reference.Layout(preset, head_dim, heads), **options)
    layout = kvarn.Layout(preset, head_dim=head_dim, kv_heads=heads)
    for target in TARGETS:
        snapshots, outputs, expanded = run(verbs_of(target), layout, **options)
        for index, (ours, theirs) in enumerate(zip(snapshots, expected[0], strict=True)):
            assert_same_pages(layout, ours, theirs, f"{target}, step {index}")
        for name, ours, theirs in zip("kv", expanded, expected[2], strict=True):
            assert np.array_equal(ours, theirs), f"{target}: expand of {name}"
        for index, (ours, theirs) in enumerate(zip(outputs, expected[1], strict=True)):
            keywords = {name: options[name] for name in ("dtype", "gain") if name in options}
            assert_close(ours, theirs, target, f"step {index}", **keywords)


@pytest.mark.parametrize("preset", EVERY_PRESET)
def test_layout_is_the_reference_layout(preset):
    for head_dim in HEAD_DIMS:
        for heads in (1, 8, 1024):
            ours, theirs = kvarn.Layout(preset, head_dim, heads), reference.Layout(preset, head_dim, heads)
            assert ours.offsets == theirs.offsets
            for name in ("k_bits", "v_bits", "page_bytes", "page_tokens", "pages_ahead", "raw_tokens_per_page",
                         "bits_per_value", "record_bytes", "preset", "head_dim", "kv_heads"):  # fmt: skip
                assert getattr(ours, name) == getattr(theirs, name), name


def test_documented_presets_are_listed():
    assert set(DOCUMENTED) <= set(kvarn.presets()) <= set(EVERY_PRESET)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("preset", DOCUMENTED)
def test_documented_presets(preset, head_dim):
    compare(preset, head_dim)


@pytest.mark.parametrize("head_dim", [64, 80, 256])
@pytest.mark.parametrize("preset", ["kvarn_k4v2_g64", "kvarn_k3v8_g64", "kvarn_k2v3_g64", "kvarn_k8v4_g64"])
def test_short_tiles_and_odd_pairs(preset, head_dim):
    compare(preset, head_dim, heads=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("encoder", ["weighted", "varnorm"])
def test_dtypes_and_encoders(dtype, encoder):
    compare("kvarn_k4v2_g128", 128, dtype=dtype, encoder=encoder)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 8, 12, 16])
def test_query_groups(group):
    compare("kvarn_k4v3_g64", 64, group=group)


@pytest.mark.parametrize("soft_cap", [0.5, 30.0])
def test_soft_cap(soft_cap):
    compare("kvarn_k4v4_g128", 64, soft_cap=soft_cap)


@pytest.mark.parametrize("soft_cap", [0.0, 20.0])
def test_sharp_attention(soft_cap):
    """Scores of +-60: a softmax that is nearly one-hot, and rows whose early tiles weigh nothing."""
    compare("kvarn_k4v4_g128", 128, gain=12.0, soft_cap=soft_cap)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_rotate(head_dim, dtype, target):
    x = cast(hashed((5, 3, head_dim), 4), dtype)
    before, ours = as_float32(x).copy(), kvarn.rotate(x, target=target)
    assert type(ours) is type(x)
    assert ours.dtype == x.dtype
    assert np.array_equal(as_float32(x), before), "rotate must not touch its input"
    assert np.array_equal(as_float32(ours), as_float32(cast(reference.rotate(x), dtype)))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_expand_rounds_to_other_dtypes(dtype, target):
    layout = kvarn.Layout("kvarn_k4v2_g128", 96, 2)
    tables, count = disjoint_tables(layout, [256])
    pages, step = pool(layout, count), Step.of(tables, [256], [256])
    kvarn.append(layout, pages, *step, hashed((256, 2, 96), 1), hashed((256, 2, 96), 2), target=target)
    exact = reference.expand(layout, pages, step.block_table, step.seq_lens)
    kinds = [(torch.from_numpy(pages), getattr(torch, dtype))]
    if dtype != "bfloat16":
        kinds.append((pages, np.dtype(dtype)))
    for memory, kind in kinds:
        ours = kvarn.expand(layout, memory, step.block_table, step.seq_lens, dtype=kind, target=target)
        for mine, theirs in zip(ours, exact, strict=True):
            assert np.array_equal(as_float32(mine), as_float32(cast(theirs, dtype)))


@pytest.mark.parametrize("target", TARGETS)
def test_torch_numpy_and_strides_agree(target):
    """Slices of a fused qkv, padded pools and tables, an `out` of the caller's: the same bits as plain arrays."""
    layout, tokens = kvarn.Layout("kvarn_k4v2_g128", 64, 2), 200
    tables, count = disjoint_tables(layout, [tokens])
    step, fused = Step.of(tables, [tokens], [tokens]), hashed((tokens, 8, 64), 6)
    k, v, q = fused[:, 4:6], fused[:, 6:], fused[:, :4]
    plain = pool(layout, count)
    kvarn.append(layout, plain, *step, k.copy(), v.copy(), target=target)
    expected = kvarn.attend(layout, plain, *step, q.copy(), scale=0.125, target=target)

    wide = np.zeros((count, layout.page_bytes + 160), np.uint8)
    wide[:, : layout.page_bytes] = pool(layout, count)
    table = np.full((1, step.block_table.shape[1] + 9), -1, np.int32)
    table[:, : step.block_table.shape[1]] = step.block_table
    out = np.full((tokens, 6, 64), 7, np.float32)
    kvarn.append(layout, wide[:, : layout.page_bytes], table, step.seq_lens, step.query_starts, k, v, target=target)
    assert_same_pages(layout, wide[:, : layout.page_bytes], plain, "strided")
    assert not wide[:, layout.page_bytes :].any()
    view = wide[:, : layout.page_bytes]
    kvarn.attend(layout, view, table, step.seq_lens, step.query_starts, q, scale=0.125, target=target, out=out[:, 1:5])
    assert np.array_equal(out[:, 1:5], expected)
    assert (out[:, [0, 5]] == 7).all()

    pages = torch.from_numpy(pool(layout, count))
    batch = [torch.from_numpy(part) for part in step]
    rows = [torch.from_numpy(part) for part in (k, v)]
    kvarn.append(layout, pages, *batch, *rows, target=target)
    result = kvarn.attend(layout, pages, *batch, torch.from_numpy(q), scale=0.125, target=target)
    assert isinstance(result, torch.Tensor)
    assert_same_pages(layout, pages.numpy(), plain, "torch")
    assert np.array_equal(result.numpy(), expected)


@pytest.mark.parametrize("target", TARGETS)
def test_a_workspace_of_the_callers(target):
    layout, tokens = kvarn.Layout("kvarn_k4v2_g64", 64, 1), 300
    tables, count = disjoint_tables(layout, [tokens])
    step, pages = Step.of(tables, [tokens], [tokens]), pool(layout, count)
    rows = [hashed((tokens, 1, 64), seed) for seed in (1, 2, 3)]
    size = kvarn.workspace_bytes(layout, tokens, 1, 1, tokens)
    memory = np.zeros(size + 128, np.uint8)
    start = -memory.ctypes.data % 64
    workspace = memory[start : start + size]
    kvarn.append(layout, pages, *step, *rows[:2], workspace=workspace, target=target)
    ours = kvarn.attend(layout, pages, *step, rows[2], scale=0.125, workspace=workspace, target=target)
    assert not memory[start + size :].any()
    assert not memory[:start].any()
    kvarn.append(layout, pages, *step, *rows[:2], target=target)
    assert np.array_equal(ours, kvarn.attend(layout, pages, *step, rows[2], scale=0.125, target=target))
