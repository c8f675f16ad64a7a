# SPDX-License-Identifier: Apache-2.0
"""bench/results/cuda-attend.jsonl -> docs/pictures/attention.svg: attention beside FlashAttention 3.

python bench/cuda/picture.py bench/results/cuda-attend.jsonl docs/pictures/attention.svg    # with kvarn installed
"""

from __future__ import annotations

import sys
from pathlib import Path

from kvarn.bench.picture import panels_of_bars
from speed_summary import main_line, read

SHAPES = {
    "32x16384 32/8 D128": "32 requests of 16,384 tokens",
    "128x2048 32/8 D128": "128 requests of 2,048 tokens",
    "64x256-16384 32/8 D128": "64 requests of 256 to 16,384 tokens",
    "8x32768 32/8 D128": "8 requests of 32,768 tokens",
    "1x32768 32/8 D128": "one request of 32,768 tokens",
    "1x8192 32/8 D128": "one request of 8,192 tokens",
}


def panel(line: dict) -> tuple[str, list[tuple[str, float]], str]:
    """One shape: ours, the rivals of the same run, and our bytes at the speed of a copy."""
    floor = line["bytes"] / line["copy_tbps"] * 1e-6
    bars = [
        ("FlashAttention 3, bf16", line["rivals"]["fa3_bf16"]),
        ("FlashAttention 3, fp8", line["rivals"]["fa3_fp8"]),
        ("kvarn_k4v2_g128", line["us"]),
        ("its bytes, copied", floor),
    ]
    return f"us per layer and decode step, {SHAPES[line['shape']]} (less is better)", bars, "{:.1f}"


def main() -> None:
    source, target = map(Path, sys.argv[1:])
    lines = {line["shape"]: line for line in read(source) if main_line(line)}
    target.write_text(panels_of_bars([panel(lines[shape]) for shape in SHAPES]))


if __name__ == "__main__":
    main()
