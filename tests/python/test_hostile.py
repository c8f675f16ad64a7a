"""Every public Python entry with arguments it must refuse: an error of the documented class, and nothing written.

ValueError: values, shapes, names.  TypeError: kinds and dtypes.  IndexError: a page index outside the pool.
"""

import kvarn
import numpy as np
import pytest
import torch
from cases import Step, disjoint_tables, hashed, pool

LAYOUT = kvarn.Layout("kvarn_k4v2_g64", 64, 2)
TOKENS, BEFORE = 150, 130  # a prompt of two requests: 130 + 20 tokens in one step
REFUSED = (ValueError, TypeError)
TABLES, COUNT = disjoint_tables(LAYOUT, [BEFORE, TOKENS - BEFORE])


def arguments(verb: str) -> dict:
    """Valid arguments of append, attend or expand; attend's pages are those after the append."""
    step = Step.of(TABLES, [BEFORE, TOKENS - BEFORE], [BEFORE, TOKENS - BEFORE])
    step.block_table[step.block_table < 0] = 0
    out = {"layout": LAYOUT, "pages": pool(LAYOUT, COUNT), "block_table": step.block_table, "seq_lens": step.seq_lens}
    if verb == "expand":
        return out
    out["query_starts"] = step.query_starts
    rows = {"k": hashed((TOKENS, 2, 64), 1), "v": hashed((TOKENS, 2, 64), 2)}
    if verb == "append":
        return {**out, **rows}
    kvarn.append(**out, **rows)
    return {**out, "q": hashed((TOKENS, 4, 64), 3), "scale": 0.125}


def misaligned(x: np.ndarray, by: int) -> np.ndarray:
    """A copy of x whose memory starts `by` bytes after a multiple of 64."""
    memory = np.zeros(x.nbytes + 128 + by, np.uint8)
    start = -memory.ctypes.data % 64 + by
    copy = np.ndarray(x.shape, x.dtype, memory, start)
    copy[...] = x
    return copy


def readonly(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x.flags.writeable = False
    return x


def changed(x, index, value):
    x = x.copy()
    x[index] = value
    return x


def column_strided(x):
    """The same values; the last axis is not contiguous."""
    wide = np.zeros((*x.shape[:-1], 2 * x.shape[-1]), x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


class Lying:
    """Looks like an array and is not."""

    shape, ndim, dtype = (150, 2, 64), 3, np.dtype(np.float32)

    def __dlpack__(self, **_):
        raise RuntimeError("no")

    def __dlpack_device__(self):
        return (1, 0)


KINDS = {
    "None": lambda x: None,
    "a list": lambda x: x.tolist(),
    "bytes": lambda x: x.tobytes(),
    "a string": lambda x: "pages",
    "a number": lambda x: 3,
    "an object array": lambda x: x.astype(object),
    "complex": lambda x: x.astype(np.complex64),
    "bool": lambda x: x.astype(bool),
    "int64": lambda x: x.astype(np.int64),
    "float64": lambda x: x.astype(np.float64),
    "wrong byte order": lambda x: x.astype(np.dtype(np.uint16 if x.itemsize == 1 else x.dtype).newbyteorder(">")),
    "a torch tensor of int64": lambda x: torch.from_numpy(x.astype(np.int64)),
    "a sparse tensor": lambda x: torch.zeros(x.shape).to_sparse(),
    "a tensor on meta": lambda x: torch.empty(x.shape, device="meta"),
    "an object that lies": lambda x: Lying(),
}
SHAPES = {
    "no axes": lambda x: np.array(x.flat[0]),
    "empty": lambda x: x[:0],
    "one axis too many": lambda x: x[None],
    "one axis too few": lambda x: x.reshape(-1) if x.ndim > 1 else np.array(x.flat[0]),
    "last axis shorter": lambda x: x[..., :-1],
    "no last axis": lambda x: x[..., :0],
}
ROWS = {
    "a token too few": lambda x: x[:-1],
    "a token too many": lambda x: np.concatenate([x, x[:1]]),
    "no heads": lambda x: x[:, :0],
    "a head too many": lambda x: np.concatenate([x, x[:, :1]], axis=1),
    "last axis strided": column_strided,
    "last axis backwards": lambda x: x[..., ::-1],
    "transposed": lambda x: np.asfortranarray(x),
    "misaligned by 1": lambda x: misaligned(x, 1),
}
PAGES = {
    "pages cut short": lambda x: np.ascontiguousarray(x[:, :-16]),
    "pages too long": lambda x: np.pad(x, ((0, 0), (0, 16))),
    "rows backwards": lambda x: x[::-1],
    "misaligned by 1": lambda x: misaligned(x, 1),
    "misaligned by 8": lambda x: misaligned(x, 8),
    "rows 8 bytes off": lambda x: np.pad(x, ((0, 0), (0, 8)))[:, :-8],
    "bytes strided": column_strided,
    "overlapping rows": lambda x: np.lib.stride_tricks.as_strided(x, x.shape, (16, 1)),
    "all rows the same": lambda x: np.broadcast_to(x[:1], x.shape),
    "int8": lambda x: x.view(np.int8),
}
BATCH = {
    ("block_table", "too narrow"): lambda x: np.ascontiguousarray(x[:, :-1]),
    ("block_table", "no columns"): lambda x: np.ascontiguousarray(x[:, :0]),
    ("block_table", "a row too few"): lambda x: x[:1],
    ("block_table", "a row too many"): lambda x: np.concatenate([x, x]),
    ("block_table", "entries strided"): column_strided,
    ("seq_lens", "negative"): lambda x: changed(x, 0, -1),
    ("seq_lens", "lowest"): lambda x: changed(x, 0, -(2**31)),
    ("seq_lens", "highest"): lambda x: changed(x, 0, 2**31 - 1),
    ("seq_lens", "beyond the table"): lambda x: changed(x, 1, 64 * 1000),
    ("seq_lens", "one too many"): lambda x: np.concatenate([x, x[:1]]),
    ("seq_lens", "strided"): column_strided,
    ("seq_lens", "misaligned by 1"): lambda x: misaligned(x, 1),
    ("block_table", "misaligned by 2"): lambda x: misaligned(x, 2),
    ("query_starts", "misaligned by 3"): lambda x: misaligned(x, 3),
    ("query_starts", "not from zero"): lambda x: changed(x, 0, 1),
    ("query_starts", "negative"): lambda x: changed(x, 1, -5),
    ("query_starts", "falling"): lambda x: changed(x, 1, TOKENS + 9),
    ("query_starts", "beyond the tokens"): lambda x: changed(x, -1, TOKENS + 1),
    ("query_starts", "before the last token"): lambda x: changed(x, -1, TOKENS - 1),
    ("query_starts", "highest"): lambda x: changed(x, -1, 2**31 - 1),
    ("query_starts", "one too few"): lambda x: x[:-1],
    ("query_starts", "more new tokens than length"): lambda x: changed(x, 1, BEFORE - 30),
}


def refusals():
    """(verb, argument, name, change, classes)."""
    for verb, rows in (("append", ("k", "v")), ("attend", ("q",)), ("expand", ())):
        batch = ("block_table", "seq_lens", *(() if verb == "expand" else ("query_starts",)))
        for argument in ("pages", *batch, *rows):
            for name, change in (KINDS | SHAPES).items():
                if (verb, argument, name) != ("expand", "block_table", "last axis shorter"):  # enough for whole tiles
                    yield verb, argument, name, change, (*REFUSED, IndexError) if name == "empty" else REFUSED
        for argument in rows:
            for name, change in ROWS.items():
                yield verb, argument, name, change, ValueError
        for name, change in PAGES.items():
            yield verb, "pages", name, change, REFUSED
        for (argument, name), change in BATCH.items():
            if argument in batch and (verb, name) != ("expand", "too narrow"):
                yield verb, argument, name, change, ValueError
        for index in (COUNT, 10**6, 2**31 - 1, -1, -(2**31)):
            yield verb, "block_table", str(index), (lambda x, index=index: changed(x, (0, 1), index)), IndexError
        yield verb, "layout", "a string", lambda x: "kvarn_k4v2_g64", TypeError
        yield verb, "layout", "None", lambda x: None, TypeError


@pytest.mark.parametrize(
    ("verb", "argument", "name", "change", "classes"),
    [pytest.param(*r, id=f"{r[0]}-{r[1]}-{r[2]}") for r in refusals()],
)
def test_refused(verb, argument, name, change, classes):
    given = arguments(verb)
    before = given["pages"].copy()
    original = given["pages"]
    given[argument] = change(given[argument])
    with pytest.raises(classes) as caught:
        getattr(kvarn, verb)(**given)
    assert len(str(caught.value)) > 10, "a message that says what is wrong"
    assert np.array_equal(original, before), "an error must not write"
