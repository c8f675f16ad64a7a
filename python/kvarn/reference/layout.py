"""Sections 1, 3 and 4 of docs/specification.md: what follows from a preset, and where a code lies in a record."""

import re
from dataclasses import dataclass, field
from functools import cache

import numpy as np

PLANES = {8: (8,), 4: (4,), 3: (2, 1), 2: (2,)}


@dataclass(frozen=True)
class Layout:
    """Everything that follows from (preset, head_dim, kv_heads); attributes are named as in kvarn.Layout."""

    preset: str
    head_dim: int
    kv_heads: int
    k_bits: int = field(init=False)
    v_bits: int = field(init=False)
    page_tokens: int = field(init=False)

    def __post_init__(self):
        match = re.fullmatch(r"kvarn_k([8432])v([8432])_g(128|64)", self.preset)
        if not match or self.head_dim not in (64, 80, 96, 128, 256):
            raise ValueError(f"no such layout: {self.preset} with head_dim {self.head_dim}")
        for name, value in zip(("k_bits", "v_bits", "page_tokens"), match.groups(), strict=True):
            object.__setattr__(self, name, int(value))

    @property
    def sections(self) -> list[tuple[str, int]]:
        """(name, bytes) in the order of a record."""
        G, D = self.page_tokens, self.head_dim
        return [
            ("k_codes", G * D * self.k_bits // 8), ("k_scale", 2 * D), ("k_zero", 2 * D), ("k_token", 2 * G),
            ("v_codes", G * D * self.v_bits // 8), ("v_channel", 2 * D), ("v_scale", 2 * G), ("v_zero", 2 * G),
        ]  # fmt: skip

    @property
    def offsets(self) -> dict[str, int]:
        """Section name -> byte offset in a record."""
        ends = np.cumsum([size for _, size in self.sections])
        return {name: int(end) - size for (name, size), end in zip(self.sections, ends, strict=True)}

    @property
    def record_bytes(self) -> int:
        return sum(size for _, size in self.sections)

    @property
    def page_bytes(self) -> int:
        return self.kv_heads * self.record_bytes

    @property
    def bits_per_value(self) -> float:
        return 8 * self.record_bytes / (2 * self.page_tokens * self.head_dim)

    @property
    def raw_tokens_per_page(self) -> int:
        return self.record_bytes // (4 * self.head_dim)

    @property
    def pages_ahead(self) -> int:
        return -(-self.page_tokens // self.raw_tokens_per_page)


@cache
def _fragment_sources(rows: int, columns: int, width: int) -> np.ndarray:
    """int [8 / width][bytes of the plane]: which element (row * columns + column) each field of each byte holds."""
    fields = 8 // width
    fr = 1
    while 2 * fr <= fields and (rows // 16) % (2 * fr) == 0:
        fr *= 2
    fc = fields // fr
    r, c = np.indices((rows, columns))
    block, field_r, slot = r // (16 * fr), r // 16 % fr, r % 16
    step, field_c, byte = c // (4 * fc), c // 4 % fc, 2 * (c % 2) + c // 2 % 2
    line = block * (columns // (4 * fc)) + step
    offset = 64 * line + 4 * (slot ^ np.where(step % 4 >= 2, 8, 0)) + byte
    sources = np.full((fields, rows * columns * width // 8), -1)
    sources[field_c * fr + field_r, offset] = r * columns + c
    assert (sources >= 0).all(), "fragment order: not a bijection"
    return sources


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 codes [rows][columns] -> uint8 [rows * columns * bits / 8] in fragment order."""
    planes, low = [], 0
    for width in PLANES[bits]:
        fields = (codes.reshape(-1) >> low & ((1 << width) - 1))[_fragment_sources(*codes.shape, width)]
        shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
        planes.append(np.bitwise_or.reduce(fields << shifts, axis=0))
        low += width
    return np.concatenate(planes)


def unpack_codes(data: np.ndarray, rows: int, columns: int, bits: int) -> np.ndarray:
    """The inverse of pack_codes."""
    codes, low, start = np.zeros(rows * columns, np.uint8), 0, 0
    for width in PLANES[bits]:
        sources = _fragment_sources(rows, columns, width)
        plane = data[start : start + sources.shape[1]]
        shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
        codes[sources] |= (plane >> shifts & ((1 << width) - 1)) << low
        low, start = low + width, start + sources.shape[1]
    return codes.reshape(rows, columns)


@dataclass
class Record:
    """One tile of one head. Codes uint8: k [G][D], v [D][G]; the vectors float32 with binary16 values."""

    k_codes: np.ndarray
    k_scale: np.ndarray
    k_zero: np.ndarray
    k_token: np.ndarray
    v_codes: np.ndarray
    v_channel: np.ndarray
    v_scale: np.ndarray
    v_zero: np.ndarray

    def to_bytes(self, layout: Layout) -> np.ndarray:
        parts = []
        for name, _ in layout.sections:
            value = getattr(self, name)
            if name.endswith("_codes"):
                parts.append(pack_codes(value, layout.k_bits if name == "k_codes" else layout.v_bits))
            else:
                parts.append(value.astype(np.float16).view(np.uint8))
        return np.concatenate(parts)

    @classmethod
    def from_bytes(cls, data: np.ndarray, layout: Layout) -> "Record":
        G, D, offsets, parts = layout.page_tokens, layout.head_dim, layout.offsets, {}
        for name, size in layout.sections:
            section = data[offsets[name] : offsets[name] + size]
            if name == "k_codes":
                parts[name] = unpack_codes(section, G, D, layout.k_bits)
            elif name == "v_codes":
                parts[name] = unpack_codes(section, D, G, layout.v_bits)
            else:
                parts[name] = section.copy().view(np.float16).astype(np.float32)
        return cls(**parts)

    def expand(self, dtype=np.float32) -> tuple[np.ndarray, np.ndarray]:
        """K^ and V^, [G][D] each, in the arithmetic of `dtype` (float32 is the normative one)."""
        p = {name: getattr(self, name).astype(dtype) for name in self.__dataclass_fields__}
        k = (p["k_codes"] * p["k_scale"] + p["k_zero"]) * p["k_token"][:, None]
        v = (p["v_codes"].T * p["v_scale"][:, None] + p["v_zero"][:, None]) * p["v_channel"]
        return k, v
