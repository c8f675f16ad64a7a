"""The lines of speed.cu and rivals.py -> bench/results/cuda-*.jsonl, and a table.

python bench/cuda/speed_summary.py [--commit HASH] [--results FOLDER] speed.jsonl rivals.jsonl
python bench/cuda/speed_summary.py --markdown bench/results/cuda-attend.jsonl ..    # tables for docs/kernels.md
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path

# Which file a benchmark's lines go to.
FILES = {
    "append": "cuda-append.jsonl",
    "pack": "cuda-append.jsonl",
    "expand": "cuda-expand.jsonl",
    "prefill": "cuda-expand.jsonl",
}
# Microseconds at most that the project set itself, one row, random tails, k4v2_g128, on an H200.
ATTEND_US = {
    "32x8192 32/8 D128": 60,
    "32x16384 32/8 D128": 112,
    "16x131072 32/8 D128": 438,
    "8x32768 32/8 D128": 60,
    "1x131072 32/8 D128": 36,
    "1x32768 32/8 D128": 15.5,
    "1x8192 32/8 D128": 8.5,
    "128x2048 32/8 D128": 65,
    "32x16384 32/4 D128": 62,
}
# Percent of copy at least.
PERCENT = {
    ("kvarn_k4v2_g128", "32x1024-32768 32/8 D128"): 85,
    ("kvarn_k4v2_g128", "64x256-16384 32/8 D128"): 85,
    ("kvarn_k4v2_g128", "256x128-4096 32/8 D128"): 85,
    ("kvarn_k4v2_g128", "32x16384 32/8 D64"): 90,
    ("kvarn_k4v2_g128", "32x16384 32/8 D256"): 90,
    ("kvarn_k4v3_g128", "32x16384 32/8 D128"): 90,
    ("kvarn_k2v2_g128", "32x16384 32/8 D128"): 90,
    ("kvarn_k4v4_g128", "32x16384 32/8 D128"): 90,
}
ROWS = {2: 1.05, 4: 1.4}  # times one row, at most, at 32x8192
APPEND_US = {
    "prefill, 128 tiles complete, 8 heads D128, batch 1": 250,
    "decode, 128 of 128 tiles complete, 8 heads D128, batch 128": 250,
    "prefill, 128 tiles complete, feedback, 8 heads D128, batch 1": 310,
    "decode, 128 of 128 tiles complete, feedback, 8 heads D128, batch 128": 310,
    "decode, 1 of 1 tiles complete, 8 heads D128, batch 1": 25,
    "decode, none complete, 8 heads D128, batch 32": 2.5,
}


def target(line: dict, lines: list[dict]) -> tuple[str, bool] | None:
    """What the project wants of this line and whether it has it; None where nothing was set."""
    shape, bench, us, percent = line["shape"], line["bench"], line["us"], line["percent_of_copy"]
    if bench == "append" and shape in APPEND_US:
        return f"<={APPEND_US[shape]} us", us <= APPEND_US[shape]
    if bench == "expand" and line["bytes"] > 2e8:
        return ">=85 %", percent >= 85
    if bench != "attend":
        return None
    if line["rows"] > 1:
        one = [x["us"] for x in lines if x["shape"] == shape and x["tail"] == "random" and main_line(x)]
        if line["rows"] not in ROWS or not shape.startswith("32x8192") or not one:
            return None
        return f"<={ROWS[line['rows']]:.2f}x", us <= ROWS[line["rows"]] * one[0]
    if line["tail"] != "random":
        return (">=95 %", percent >= 95) if line["bytes"] > 2.2e8 and shape in ATTEND_US else None
    if main_line(line) and shape in ATTEND_US and "H200" in line["device"]:
        return f"<={ATTEND_US[shape]} us", us <= ATTEND_US[shape]
    least = PERCENT.get((line["preset"], shape))
    return (f">={least} %", percent >= least) if least else None


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.startswith("{")]


def with_rivals(rows: list[dict], rivals: list[dict], commit: str) -> list[dict]:
    """The lines of the results: rivals of the same shape and rows beside every attend line."""
    lines = []
    for row in rows:
        line = {"date": datetime.date.today().isoformat(), "commit": commit} | row
        line["rivals"] = {
            r["rival"]: r["us"]
            for r in rivals
            if row["bench"].startswith("attend") and (r["shape"], r["rows"]) == (row["shape"], row["rows"])
        }
        lines.append(line)
    return lines


def times(line: dict, rival: str) -> str:
    """The rival's microseconds and how many times ours they are."""
    us = line["rivals"].get(rival)
    return f"{us} ({us / line['us']:.2f}x)" if us else "-"


def table(lines: list[dict]) -> str:
    """A fixed-width table for a terminal; MISS marks what misses its target."""
    text = [
        f"{'bench':11} {'preset':9} {'shape':24} rows {'tail':7} {'us':>8} {'% copy':>6} {'target':>10}      "
        f"{'error':>7} {'MHz':>4} {'fa3 bf16':>8} {'fa3 fp8':>8} {'sdpa':>8}"
    ]
    for line in lines:
        wanted, met = target(line, lines) or ("", True)
        percent = f"{line['percent_of_copy']:.1f}" if line["bytes"] else ""
        fa3, fp8, sdpa = (line["rivals"].get(name, "") for name in ("fa3_bf16", "fa3_fp8", "sdpa_bf16"))
        text.append(
            f"{line['bench']:11} {line['preset'][6:]:9} {line['shape']:24} {line['rows']:>4} {line['tail'] or '-':7} "
            f"{line['us']:>8.2f} {percent:>6} {wanted:>10} {'' if met else 'MISS':4} "
            f"{line['relative_error']:>7.1e} {line['sm_mhz']:>4.0f} {fa3:>8} {fp8:>8} {sdpa:>8}"
        )
    return "\n".join(text)


def main_line(line: dict) -> bool:
    """Is this a line of the issue's table: one row, random tails, the default preset, float16?"""
    return (line["bench"], line["preset"], line["rows"], line["tail"]) == ("attend", "kvarn_k4v2_g128", 1, "random")


def markdown(lines: list[dict]) -> str:
    """The tables of docs/kernels.md."""
    first = lines[0]
    text = [
        f"{first['device']}, {first['date']}, commit {first['commit']}; copy {first['copy_tbps']:.2f} TB/s.",
        "",
        "| shape | preset | rows | own tile | us | % of copy | target | FA3 bf16, us | FA3 fp8, us | SDPA bf16, us |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        cells = [times(line, name) for name in ("fa3_bf16", "fa3_fp8", "sdpa_bf16")]
        wanted, met = target(line, lines) or ("-", True)
        text.append(
            f"| {line['bench']} {line['shape']} | {line['preset'][6:]} | {line['rows']} | {line['tail'] or '-'} "
            f"| {line['us']:.1f} | {line['percent_of_copy']:.0f} | {wanted}{'' if met else ' (missed)'} "
            f"| {' | '.join(cells)} |"
        )
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--results", default="", help="folder to write to; nothing is written without")
    parser.add_argument("--markdown", action="store_true")
    arguments = parser.parse_args()
    if arguments.markdown:
        for path in arguments.files:
            print(markdown(read(path)), end="\n\n")
        return
    rows = [row for path in arguments.files for row in read(path)]
    rivals = [row for row in rows if "rival" in row]
    lines = with_rivals([row for row in rows if "bench" in row], rivals, arguments.commit)
    if arguments.results:
        for name in {"cuda-attend.jsonl", *FILES.values()}:
            mine = [line for line in lines if FILES.get(line["bench"], "cuda-attend.jsonl") == name]
            if mine:
                Path(arguments.results, name).write_text("".join(json.dumps(line) + "\n" for line in mine))
    print(table(lines))


if __name__ == "__main__":
    main()
