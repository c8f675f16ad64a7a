"""The layout of pages: everything that follows from (preset, head_dim, kv_heads)."""

from __future__ import annotations

from kvarn import _core


class Layout:
    """Sizes of one layer's pages, from the C++ layout table (docs/specification.md sections 3 and 4).

    preset    "kvarn_k{8,4,3,2}v{8,4,3,2}_g{128,64}"
    head_dim  64, 80, 96, 128 or 256;  kv_heads  1 .. 1024
    Raises ValueError for anything else.

    page_bytes            bytes of a page: one tile of every KV head
    page_tokens           G, tokens of a tile and of a page
    pages_ahead           m, pages that a running request holds beyond ceil(tokens / G)
    raw_tokens_per_page   n, also the most drafts that one step may carry
    record_bytes          bytes of one (tile, KV head)
    bits_per_value        all scales counted
    """

    __slots__ = ("_core", "_head_dim", "_kv_heads", "preset")

    def __init__(self, preset: str, head_dim: int, kv_heads: int):
        self._core = _core.layout(preset, head_dim, kv_heads)
        # torch.compile can read Python's integers, not what is behind _core.
        self.preset, self._head_dim, self._kv_heads = preset, int(head_dim), int(kv_heads)

    head_dim = property(lambda self: self._head_dim)
    kv_heads = property(lambda self: self._kv_heads)
    k_bits = property(lambda self: self._core.k_bits)
    v_bits = property(lambda self: self._core.v_bits)
    page_tokens = property(lambda self: self._core.page_tokens)
    page_bytes = property(lambda self: self._core.page_bytes)
    pages_ahead = property(lambda self: self._core.pages_ahead)
    raw_tokens_per_page = property(lambda self: self._core.raw_tokens_per_page)
    record_bytes = property(lambda self: self._core.record_bytes)
    offsets = property(lambda self: self._core.offsets, doc="byte offset of each section of a record")

    @property
    def bits_per_value(self) -> float:
        return 8 * self.record_bytes / (2 * self.page_tokens * self.head_dim)

    def __eq__(self, other) -> bool:
        return isinstance(other, Layout) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self):
        return self.preset, self.head_dim, self.kv_heads

    def __reduce__(self):
        return Layout, self._key()

    def __repr__(self) -> str:
        return f"Layout({self.preset!r}, head_dim={self.head_dim}, kv_heads={self.kv_heads})"
