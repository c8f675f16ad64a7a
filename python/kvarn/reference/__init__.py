"""The verbs of kvarn in numpy, written from the text of docs/specification.md alone.

For tests and readers: same arguments as kvarn.append, attend, expand and rotate, no checks, one tile after the other.
append and expand are exact to the bit; attend works in float64 from the dequantized records. Tensors are numpy arrays
or CPU torch tensors. `workspace` is a dict that append fills and the same step's attend reads (None: one of the
module's); `target` is accepted and ignored.
"""

import numpy as np

from .arithmetic import F16_MAX, hadamard
from .encoders import encode
from .layout import Layout, Record, pack_codes, unpack_codes

__all__ = ["Layout", "Record", "append", "attend", "expand", "pack_codes", "rotate", "unpack_codes"]

_default_workspace: dict = {}


def _float32(x) -> np.ndarray:
    """x as float32; torch tensors by torch, which knows bfloat16."""
    return x.float().numpy() if hasattr(x, "float") else np.asarray(x).astype(np.float32)


def _layout(layout) -> Layout:
    return layout if isinstance(layout, Layout) else Layout(layout.preset, layout.head_dim, layout.kv_heads)


def rotate(x, target=None) -> np.ndarray:
    """The rotation of section 2 along the last axis: float32, of any float dtype."""
    return hadamard(_float32(x))


def _clean_rotated(x) -> tuple[np.ndarray, np.ndarray]:
    """[tokens][H][D] -> (binary16 rotated, number of replaced elements per token)."""
    x = _float32(x)
    replaced = np.count_nonzero(~(np.abs(x) <= F16_MAX), axis=(1, 2))
    x = hadamard(np.clip(np.nan_to_num(x, nan=0.0, posinf=np.inf, neginf=-np.inf), -F16_MAX, F16_MAX))
    halves = np.clip(x, -F16_MAX, F16_MAX).astype(np.float16)
    return halves + np.float16(0), replaced  # -0 + 0 is 0: a zero has no sign


class _Request:
    """One request's tokens in the pages: raw places, records, and which tiles are in pages (section 8)."""

    def __init__(self, layout, pages, table, length, new):
        self.layout, self.pages, self.table = layout, pages, table
        self.length, self.before = length, length - new

    def in_pages(self, tile: int) -> bool:
        return self.length - (tile + 1) * self.layout.page_tokens <= self.layout.raw_tokens_per_page

    def _page(self, index: int) -> np.ndarray:
        """uint8 [H][record_bytes], a view of the page at `index` of the block table."""
        return self.pages[self.table[index]].reshape(self.layout.kv_heads, self.layout.record_bytes)

    def raw(self, tile: int, token: int) -> np.ndarray:
        """float16 [H][2][D]: the raw K and V of a token, a view."""
        n, m, D = self.layout.raw_tokens_per_page, self.layout.pages_ahead, self.layout.head_dim
        index, slot = (tile + m, token) if token < n else (tile + token // n, token % n)
        region = self._page(index)[:, : 4 * n * D].view(np.float16)
        return region.reshape(self.layout.kv_heads, 2, n, D)[:, :, slot]

    def tile(self, tile: int, count: int, workspace: dict, key) -> np.ndarray:
        """float16 [2][count][H][D]: the first raw tokens of a tile, from where they are in this step."""
        if not self.in_pages(tile):
            return workspace[key, tile][:, :count]
        return np.stack([self.raw(tile, token).swapaxes(0, 1) for token in range(count)], axis=1)

    def write_record(self, tile: int, records) -> None:
        for head, record in enumerate(records):
            self._page(tile)[head] = record.to_bytes(self.layout)

    def records(self, tile: int) -> list[Record]:
        return [Record.from_bytes(data, self.layout) for data in self._page(tile)]

    def history(self, tiles: int, dtype) -> tuple[np.ndarray, np.ndarray]:
        """K^ and V^ of the first tiles, [tokens][H][D]."""
        shape = (0, self.layout.kv_heads, self.layout.head_dim)
        parts = [[np.zeros(shape, dtype)], [np.zeros(shape, dtype)]]
        for tile in range(tiles):
            heads = [record.expand(dtype) for record in self.records(tile)]
            for side in range(2):
                parts[side].append(np.stack([head[side] for head in heads], axis=1))
        return np.concatenate(parts[0]), np.concatenate(parts[1])


def _requests(layout, pages, block_table, seq_lens, query_starts):
    """(index, request, its slice of the step's tokens), without the requests that take no part."""
    pages, block_table = np.asarray(pages), np.asarray(block_table)
    starts = [int(start) for start in query_starts]
    for index, length in enumerate(seq_lens):
        if length > 0:
            new = slice(starts[index], starts[index + 1])
            yield index, _Request(layout, pages, block_table[index], int(length), new.stop - new.start), new


def append(layout, pages, block_table, seq_lens, query_starts, k, v, workspace=None, encoder="weighted", target=None, *,
           feedback=None, balance=None):  # fmt: skip
    """Section 8. k, v [tokens][H][D], feedback None or [H][D][D], balance None or [H][D]; returns the number of
    replaced elements of requests that take part."""
    layout, G = _layout(layout), _layout(layout).page_tokens
    requests = list(_requests(layout, pages, block_table, seq_lens, query_starts))
    workspace = _default_workspace if workspace is None else workspace
    workspace.clear()
    k, replaced_k = _clean_rotated(k if balance is None else _float32(k) / np.asarray(balance))
    v, replaced_v = _clean_rotated(v)

    for key, request, _ in requests:
        first = request.before // G
        for tile in range(first, -(-request.length // G)):
            if not request.in_pages(tile):
                workspace[key, tile] = np.zeros((2, G, layout.kv_heads, layout.head_dim), np.float16)
        if not request.in_pages(first):
            for token in range(request.before % G):
                workspace[key, first][:, token] = request.raw(first, token).swapaxes(0, 1)

    for key, request, new in requests:
        for position, source in enumerate(range(new.start, new.stop), request.before):
            tile, token = divmod(position, G)
            if request.in_pages(tile):
                request.raw(tile, token)[:, 0], request.raw(tile, token)[:, 1] = k[source], v[source]
            else:
                workspace[key, tile][0, token], workspace[key, tile][1, token] = k[source], v[source]

    for key, request, _ in requests:
        for tile in range(request.before // G, request.length // G):
            raw = request.tile(tile, G, workspace, key).astype(np.float32).swapaxes(1, 2)
            K, V = encode(raw[0], raw[1], layout.k_bits, layout.v_bits, encoder, feedback)
            request.write_record(tile, [
                Record(K.codes[h].T, K.scale[h, :, 0], K.zero[h, :, 0], K.column[h, 0],
                       V.codes[h].T, V.column[h, 0], V.scale[h, :, 0], V.zero[h, :, 0])
                for h in range(layout.kv_heads)
            ])  # fmt: skip
    return sum(int((replaced_k + replaced_v)[new].sum()) for _, _, new in requests)


def attend(layout, pages, block_table, seq_lens, query_starts, q, *, scale, soft_cap=0.0, out=None, workspace=None,
           target=None, balance=None):  # fmt: skip
    """Section 9 in float64. q [tokens][query heads][D] -> out, float64 unless `out` is given."""
    layout, G = _layout(layout), _layout(layout).page_tokens
    workspace = _default_workspace if workspace is None else workspace
    q = _float32(q).astype(np.float64)
    out = np.zeros(q.shape) if out is None else out
    group = q.shape[1] // layout.kv_heads
    if balance is not None:
        q = q * np.asarray(balance, np.float64).repeat(group, 0)
    for key, request, new in _requests(layout, pages, block_table, seq_lens, query_starts):
        position = request.before
        while position < request.length:
            tile, end = position // G, min((position // G + 1) * G, request.length)
            packed = request.history(tile, np.float64)
            raw = request.tile(tile, end - tile * G, workspace, key).astype(np.float64)
            k, v = (np.concatenate(pair).repeat(group, axis=1) for pair in zip(packed, raw, strict=True))
            rows = slice(new.start + position - request.before, new.start + end - request.before)
            y = np.einsum("thd,shd->hts", hadamard(q[rows]), k) * scale
            if soft_cap:
                y = soft_cap * np.tanh(y / soft_cap)
            future = np.arange(end) > np.arange(position, end)[:, None]
            y = np.where(future, -np.inf, y)
            p = np.exp(y - y.max(-1, keepdims=True))
            p /= p.sum(-1, keepdims=True)
            out[rows] = hadamard(np.einsum("hts,shd->thd", p, v))
            position = end
    return out


def expand(layout, pages, block_table, seq_lens, dtype=None, target=None) -> tuple[np.ndarray, np.ndarray]:
    """Section 10: K^ and V^ of the complete tiles, request after request, [tokens][H][D] float32."""
    layout, parts = _layout(layout), ([], [])
    for row, length in zip(np.asarray(block_table), seq_lens, strict=True):
        request = _Request(layout, np.asarray(pages), row, int(length), 0)
        for side, tokens in zip(parts, request.history(int(length) // layout.page_tokens, np.float32), strict=True):
            side.append(tokens)
    k, v = (np.concatenate(side).astype(dtype or np.float32) for side in parts)
    return k, v
