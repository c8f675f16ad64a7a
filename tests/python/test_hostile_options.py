"""The other arguments of every public Python entry: layouts, names, scales, buffers, workspaces."""

import os
import subprocess
import sys

import kvarn
import numpy as np
import pytest
import torch
from cases import TARGETS, Step, disjoint_tables, hashed, pool
from test_hostile import COUNT, LAYOUT, REFUSED, TOKENS, arguments, column_strided, misaligned, readonly

GOOD = ("kvarn_k4v2_g128", 128, 8)


@pytest.mark.parametrize("preset", [
    "", "kvarn", "kvarn_", "kvarn_k4v2", "kvarn_k4v2_g", "kvarn_k4v2_g32", "kvarn_k5v2_g128", "kvarn_k4v0_g128", "fp8",
    "kvarn_k4v2_g128 ", " kvarn_k4v2_g128", "KVARN_K4V2_G128", "kvarn_k4v2_g128\0", "kvarn_k4v2_g128x",
    "kvarn_k16v2_g128", "kvarn_k-4v2_g128", "kvarn_k4v2_g99999999999999999999", "kvarn_kv2_g128", "%s%n%s",
    "ü" * 50, "k" * 100_000,
])  # fmt: skip
def test_unknown_presets(preset):
    with pytest.raises(ValueError, match=r".{20}"):
        kvarn.Layout(preset, 128, 8)


@pytest.mark.parametrize(("position", "value"), [
    *((0, value) for value in (None, 4, b"kvarn_k4v2_g128", ["kvarn_k4v2_g128"])),
    *((1, value) for value in (None, 0, -1, -128, 1, 63, 72, 100, 127, 129, 192, 512, 2**31 - 1, 2**31, 2**63)),
    *((1, value) for value in (-(2**70), 128.5, "128", np.nan)),
    *((2, value) for value in (None, 0, -1, 1025, 2**31 - 1, 2**32 + 8, 2**80, "8", 1.5)),
])  # fmt: skip
def test_layouts_that_do_not_exist(position, value):
    given = list(GOOD)
    given[position] = value
    with pytest.raises(REFUSED):
        kvarn.Layout(*given)


def test_a_layout_is_a_value():
    import copy
    import pickle

    layout = kvarn.Layout(*GOOD)
    assert layout == pickle.loads(pickle.dumps(layout)) == copy.deepcopy(layout) != kvarn.Layout(GOOD[0], 64, 8)
    assert hash(layout) == hash(copy.copy(layout))
    with pytest.raises(AttributeError):
        layout.page_bytes = 1


OPTIONS = [
    *(("append", "encoder", value, ValueError) for value in ("unknown", "", "WEIGHTED", "weighted\0")),
    *(("append", "encoder", value, TypeError) for value in (None, 3)),
    *(("attend", "scale", value, ValueError) for value in (np.nan, np.inf, 1e300)),
    *(("attend", "scale", value, REFUSED) for value in (None, "0.1", 10**400)),
    *(("attend", "soft_cap", value, ValueError) for value in (-1.0, np.nan, np.inf)),
    ("attend", "soft_cap", None, TypeError),
    *((verb, "target", name, ValueError) for verb in ("append", "attend", "expand") for name in ("", "neon", "avx2 ")),
    *((verb, "target", 3, TypeError) for verb in ("append", "attend", "expand")),
    *(("expand", "dtype", value, TypeError) for value in ("float99", np.float64, np.int32)),
    ("attend", "out", "nowhere", TypeError), ("attend", "out", 3, TypeError),
    ("attend", "out", np.zeros((TOKENS, 4, 64), np.float64), TypeError),
    ("attend", "out", np.zeros((TOKENS, 4, 64), np.int32), TypeError),
    ("attend", "out", np.zeros((TOKENS - 1, 4, 64), np.float32), ValueError),
    ("attend", "out", np.zeros((TOKENS, 2, 64), np.float32), ValueError),
    ("attend", "out", np.zeros((TOKENS, 4, 32), np.float32), ValueError),
    ("attend", "out", np.zeros((TOKENS, 256), np.float32), ValueError),
    ("attend", "out", column_strided(np.zeros((TOKENS, 4, 64), np.float32)), ValueError),
    ("attend", "out", misaligned(np.zeros((TOKENS, 4, 64), np.float32), 1), ValueError),
    ("attend", "out", readonly(np.zeros((TOKENS, 4, 64), np.float32)), REFUSED),
    ("attend", "q", np.zeros((TOKENS, 3, 64), np.float32), ValueError),
    ("attend", "q", np.zeros((TOKENS, 2 * 65, 64), np.float32), ValueError),
    ("attend", "q", np.zeros((TOKENS, 4, 128), np.float32), ValueError),
    *((verb, "workspace", value, classes) for verb in ("append", "attend") for value, classes in (
        (np.zeros(0, np.uint8), ValueError), (misaligned(np.zeros(64, np.uint8), 0), ValueError),
        (misaligned(np.zeros(1 << 24, np.uint8), 1), ValueError), (np.zeros(1 << 22, np.float32), TypeError),
        (np.zeros((4, 1 << 22), np.uint8), ValueError), (readonly(np.zeros(1 << 24, np.uint8)), REFUSED),
        ("scratch", TypeError), (1 << 24, TypeError),
    )),
    ("append", "pages", None, TypeError), ("append", "pages", readonly(pool(LAYOUT, COUNT)), REFUSED),
]  # fmt: skip


@pytest.mark.parametrize(
    ("verb", "name", "value", "classes"), [pytest.param(*o, id=f"{o[0]}-{o[1]}-{i}") for i, o in enumerate(OPTIONS)]
)
def test_refused_options(verb, name, value, classes):
    given = arguments(verb)
    before, original = given["pages"].copy(), given["pages"]
    given[name] = value
    with pytest.raises(classes) as caught:
        getattr(kvarn, verb)(**given)
    assert len(str(caught.value)) > 10
    assert np.array_equal(original, before)


@pytest.mark.parametrize(("value", "classes"), [
    (None, REFUSED), ("x", TypeError), (3, TypeError), ([1.0] * 64, TypeError), (np.float32(1), REFUSED),
    *((np.zeros(shape, np.float32), ValueError) for shape in ((), (4, 0), (4, 63), (4, 512))),
    (np.zeros((4, 64), np.float64), TypeError),
    (np.zeros((4, 64), np.int32), TypeError), (np.zeros((4, 64), object), TypeError), (torch.zeros(4, 63), ValueError),
    (torch.zeros(4, 64, dtype=torch.float64), TypeError), (torch.empty(4, 64, device="meta"), REFUSED),
])  # fmt: skip
def test_rotate_refuses(value, classes):
    with pytest.raises(classes):
        kvarn.rotate(value)


def test_rotate_takes_any_shape_with_a_contiguous_last_axis():
    x = hashed((6, 5, 64), 1)
    expected = kvarn.rotate(x)
    for view in (np.pad(x, ((0, 0), (0, 3), (0, 9)))[:, :5, :64], x[::-1][::-1], misaligned(x, 4)):
        assert np.array_equal(kvarn.rotate(view), expected)
    for view in (column_strided(x), np.asfortranarray(x)):
        try:
            assert np.array_equal(kvarn.rotate(view), expected)
        except ValueError as error:
            assert "contiguous" in str(error)
    assert np.array_equal(kvarn.rotate(x[3, 2]), expected[3, 2])
    assert kvarn.rotate(x[:0]).shape == (0, 5, 64)
    assert np.array_equal(kvarn.rotate(x[::-2]), expected[::-2])


@pytest.mark.parametrize("given", [
    (-1, 1, 4, 100), (1, -1, 4, 100), (1, 1, -4, 100), (1, 1, 4, -100), (2**62, 1, 4, 100), (1, 2**62, 4, 100),
    (1, 1, 2**62, 100), (1, 1, 4, 2**62), (2**70, 1, 4, 100), ("1", 1, 4, 100), (None, 1, 4, 100),
    (1, 1, 4, 100, 0), (1, 1, 4, 100, -1), (1, 1, 4, 100, 2**31), (2**31, 2**31, 128, 2**31),
])  # fmt: skip
def test_absurd_workspaces_are_refused_or_huge(given):
    try:
        size = kvarn.workspace_bytes(LAYOUT, *given)
    except REFUSED:
        return
    assert size > 1 << 30, "a size that cannot overflow into a small one"


def test_targets_by_name():
    assert kvarn.target() in TARGETS
    assert [kvarn.target(name) for name in TARGETS] == TARGETS
    for name in ("", "sse", "AVX2"):
        with pytest.raises(ValueError, match="scalar"):
            kvarn.target(name)
    with pytest.raises(TypeError):
        kvarn.target(3)


@pytest.mark.parametrize("name", [*TARGETS, "neon", ""])
def test_target_of_the_environment(name):
    code = "import kvarn; print(kvarn.target())"
    environment = {**os.environ, "KVARN_TARGET": name}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    if name == "neon":
        assert "ValueError" in result.stderr
    else:  # an empty variable counts as unset
        assert result.stdout.strip() == (name or TARGETS[0])


def test_attend_wants_the_workspace_of_its_append():
    given = arguments("attend")
    size = kvarn.workspace_bytes(LAYOUT, TOKENS, 2, 4, 200)
    fresh = misaligned(np.zeros(size, np.uint8), 0)
    with pytest.raises(ValueError, match="append"):
        kvarn.attend(**given, workspace=fresh)
    noise = misaligned(np.random.default_rng(1).integers(0, 256, size, dtype=np.uint8), 0)
    with pytest.raises(ValueError, match="append"):
        kvarn.attend(**given, workspace=noise)
    expected = kvarn.attend(**given)
    other = arguments("append")
    other["query_starts"][1:] = TOKENS - 1, TOKENS  # the same tokens, otherwise shared out
    other["seq_lens"][:] = TOKENS - 1, 1
    tables, count = disjoint_tables(LAYOUT, other["seq_lens"].tolist())
    other["block_table"], other["pages"] = Step.of(tables, [1, 1], [1, 1]).block_table, pool(LAYOUT, count)
    kvarn.append(**other, workspace=noise)
    with pytest.raises(ValueError, match="append"):
        kvarn.attend(**given, workspace=noise)
    assert np.array_equal(kvarn.attend(**given), expected)
