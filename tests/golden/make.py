"""Writes the golden files, index.txt and records.bin, from the numpy reference. `make.py --check` only compares.

Each line of index.txt is one record (one tile of one KV head):

    preset head_dim encoder fnv1a64 offset bytes

The encoder `feedback` is `weighted` with the matrix of `golden_feedback`.

fnv1a64 is the 64-bit FNV-1a hash of the record, 16 hex digits. offset is where the whole record lies in records.bin, or
-1 where only its hash is kept. Lines that start with # are comments.

The input is integer arithmetic, so that any language builds the same: see `golden_input`. Only a change of the format
or of an encoder may change these files, and the changelog says so.
"""

import sys
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent
DOCUMENTED = ("k8v4", "k4v4", "k4v3", "k3v3", "k4v2", "k2v2")
HEADER = "# preset head_dim encoder fnv1a64 offset bytes; written by make.py, which says what the input is\n"


def hashed(count: int, seed: int) -> np.ndarray:
    """float32 [count]: element i is (sum of the four bytes of mix(i) - 510) / 128, about normal with deviation 1.16.

    In uint32, wrapping: x = i * 2654435769 + seed; x ^= x >> 16; x *= 0x7feb352d; x ^= x >> 15; x *= 0x846ca68b;
    x ^= x >> 16. Every value is exact in binary16.
    """
    x = np.arange(count, dtype=np.uint32) * np.uint32(2654435769) + np.uint32(seed)
    x ^= x >> 16
    x *= np.uint32(0x7FEB352D)
    x ^= x >> 15
    x *= np.uint32(0x846CA68B)
    x ^= x >> 16
    return ((x.view(np.uint8).reshape(count, 4).sum(1).astype(np.int32) - 510) / 128).astype(np.float32)


def golden_input(head_dim: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """k, v float32 [tokens][1][head_dim] as append takes them; (t, d) starts as hashed element t * head_dim + d.

    k has seed 1, v has seed 2. Then, as in real models: channel 5 of k is multiplied by 8 and gets 24 added, every
    token with t % 7 == 3 is doubled in both, and token 0 (the attention sink) is divided by 16 in both.
    """
    k, v = (hashed(tokens * head_dim, seed).reshape(tokens, 1, head_dim) for seed in (1, 2))
    k[..., 5] = k[..., 5] * 8 + 24
    for x in (k, v):
        x[3::7] *= 2
        x[0] /= 16
    return k, v


def golden_feedback(head_dim: int) -> np.ndarray:
    """float32 [1][head_dim][head_dim]: above the diagonal hashed element i * head_dim + j of seed 3, over 16; elsewhere
    NaN, which must not count."""
    b = hashed(head_dim * head_dim, 3).reshape(head_dim, head_dim) / 16
    b[np.tril_indices(head_dim)] = np.nan
    return b[None]


def fnv1a64(data: bytes) -> int:
    value = 0xCBF29CE484222325
    for byte in data:
        value = (value ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return value


def cases() -> list[tuple[str, int, str, bool]]:
    """(preset, head_dim, encoder, whether the whole record is kept)."""
    every = [f"k{a}v{b}" for a in (8, 4, 3, 2) for b in (8, 4, 3, 2)]
    out = []
    for encoder in ("weighted", "varnorm"):
        for head_dim in (128, 64, 80, 96, 256):
            for tokens in (128, 64):
                for pair in every if head_dim == 128 else DOCUMENTED:
                    keep = head_dim == 128 and (encoder == "weighted" or (tokens == 128 and pair in DOCUMENTED))
                    out.append((f"kvarn_{pair}_g{tokens}", head_dim, encoder, keep))
    for head_dim in (128, 64, 80, 96, 256):
        for preset in ("k4v2_g128", "k2v2_g128", "k8v4_g128", "k4v3_g64", "k3v8_g64"):
            out.append((f"kvarn_{preset}", head_dim, "feedback", False))
    return out


def record(verbs, preset: str, head_dim: int, encoder: str, **options) -> np.ndarray:
    """uint8 [record_bytes]: the golden input appended through `verbs` (kvarn or kvarn.reference) to an empty pool."""
    if encoder == "feedback":
        encoder, options = "weighted", options | {"feedback": golden_feedback(head_dim)}
    layout = verbs.Layout(preset, head_dim, 1)
    tokens = layout.page_tokens
    pages = np.zeros((1 + layout.pages_ahead, layout.page_bytes), np.uint8)
    table = np.arange(len(pages), dtype=np.int32)[None]
    length, starts = np.array([tokens], np.int32), np.array([0, tokens], np.int32)
    verbs.append(layout, pages, table, length, starts, *golden_input(head_dim, tokens), encoder=encoder, **options)
    return pages[0]


def build() -> tuple[str, bytes]:
    """The contents of index.txt and records.bin."""
    from kvarn import reference

    lines, kept = [HEADER], bytearray()
    for preset, head_dim, encoder, keep in cases():
        data = record(reference, preset, head_dim, encoder).tobytes()
        offset = len(kept) if keep else -1
        kept += data if keep else b""
        lines.append(f"{preset} {head_dim} {encoder} {fnv1a64(data):016x} {offset} {len(data)}\n")
    return "".join(lines), bytes(kept)


def load() -> dict[tuple[str, int, str], tuple[str, bytes | None]]:
    """(preset, head_dim, encoder) -> (hash, record or None)."""
    data, out = (FOLDER / "records.bin").read_bytes(), {}
    for line in (FOLDER / "index.txt").read_text().splitlines():
        if not line.startswith("#"):
            preset, head_dim, encoder, digest, offset, size = line.split()
            start = int(offset)
            out[preset, int(head_dim), encoder] = digest, None if start < 0 else data[start : start + int(size)]
    return out


def main() -> int:
    index, records = build()
    if "--check" in sys.argv[1:]:
        same = (FOLDER / "index.txt").read_text() == index and (FOLDER / "records.bin").read_bytes() == records
        print("the golden files are what the reference makes" if same else "the reference makes other golden files")
        return 0 if same else 1
    (FOLDER / "index.txt").write_text(index)
    (FOLDER / "records.bin").write_bytes(records)
    print(f"{index.count(chr(10)) - 1} records, {len(records)} bytes kept")
    return 0


if __name__ == "__main__":
    sys.exit(main())
