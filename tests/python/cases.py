"""What the Python tests share: hashed inputs, pools full of rubbish, and steps over several requests."""

import functools
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import kvarn
import numpy as np
import torch

_spec = importlib.util.spec_from_file_location("golden_make", Path(__file__).parent.parent / "golden" / "make.py")
golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden)

TARGETS = kvarn.targets()
DOCUMENTED = [f"kvarn_{pair}_g128" for pair in golden.DOCUMENTED]
EVERY_PRESET = [f"kvarn_k{a}v{b}_g{g}" for g in (128, 64) for a in (8, 4, 3, 2) for b in (8, 4, 3, 2)]
HEAD_DIMS = (64, 80, 96, 128, 256)
ENCODERS = ("weighted", "varnorm")
DTYPES = ("float32", "float16", "bfloat16")


def hashed(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """float32, about normal with deviation 1.16; the golden files' generator."""
    return golden.hashed(int(np.prod(shape)), seed).reshape(shape)


def cast(x: np.ndarray, dtype: str):
    """float32 array -> numpy array, or a torch tensor where numpy lacks the dtype."""
    return torch.from_numpy(x).to(torch.bfloat16) if dtype == "bfloat16" else x.astype(dtype)


def as_float32(x) -> np.ndarray:
    return x.float().numpy() if isinstance(x, torch.Tensor) else np.asarray(x).astype(np.float32)


def pool(layout, count: int, seed: int = 99) -> np.ndarray:
    """uint8 [count][page_bytes] of pseudo-random bytes: whoever reads what nobody wrote is found out."""
    return np.random.default_rng(seed).integers(0, 256, (count, layout.page_bytes), dtype=np.uint8)


def pages_needed(layout, length: int) -> int:
    return -(-length // layout.page_tokens) + layout.pages_ahead if length else 0


@dataclass
class Step:
    """The batch arguments of a step: int32 arrays as the verbs take them."""

    block_table: np.ndarray
    seq_lens: np.ndarray
    query_starts: np.ndarray

    @classmethod
    def of(cls, tables: list[list[int]], lengths: list[int], news: list[int]) -> "Step":
        """Rows of the table are padded with a page index that must never be used."""
        width = max([len(table) for table in tables] + [1])
        block_table = np.full((len(tables), width), -7, np.int32)
        for row, table in zip(block_table, tables, strict=True):
            row[: len(table)] = table
        return cls(block_table, np.array(lengths, np.int32), np.cumsum([0, *news]).astype(np.int32))

    def __iter__(self):
        return iter((self.block_table, self.seq_lens, self.query_starts))


def disjoint_tables(layout, lengths: list[int], seed: int = 5) -> tuple[list[list[int]], int]:
    """Pages for requests that grow to `lengths`, in no order; and how many pages that takes (one stays unused)."""
    counts = [pages_needed(layout, length) for length in lengths]
    order = np.random.default_rng(seed).permutation(sum(counts) + 1).tolist()
    return [[order.pop() for _ in range(count)] for count in counts], sum(counts) + 1


def verbs_of(target: str):
    """append, attend, expand of kvarn with the target bound: what a scenario runs against."""

    class Verbs:
        Layout = kvarn.Layout
        append = staticmethod(functools.partial(kvarn.append, target=target))
        attend = staticmethod(functools.partial(kvarn.attend, target=target))
        expand = staticmethod(functools.partial(kvarn.expand, target=target))

    return Verbs


def first_difference(layout, ours: np.ndarray, theirs: np.ndarray) -> str:
    """Where two records differ first: the section and the index in it, for a failure's message."""
    where = np.flatnonzero(ours != theirs)
    if not len(where):
        return "equal"
    name, start = max(((n, s) for n, s in layout.offsets.items() if s <= where[0]), key=lambda item: item[1])
    first = where[0]
    return f"{len(where)} bytes differ, first in {name} at byte {first - start}: {ours[first]} and {theirs[first]}"


def assert_same_pages(layout, ours: np.ndarray, theirs: np.ndarray, context: str = "") -> None:
    """Equal bytes in the whole pool; the message names the page, the head and the section."""
    if np.array_equal(ours, theirs):
        return
    page, byte = (int(index[0]) for index in np.nonzero(ours != theirs))
    head, size = byte // layout.record_bytes, layout.record_bytes
    record = slice(head * size, (head + 1) * size)
    difference = first_difference(layout, ours[page, record], theirs[page, record])
    raise AssertionError(f"{context}: page {page}, head {head}: {difference}")
