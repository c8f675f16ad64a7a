# SPDX-License-Identifier: Apache-2.0
"""One engine after the other, each in a process of its own, on the same mixes of requests, and the table."""

import datetime
import json
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import kvarn
from kvarn.bench import engine, shapes
from kvarn.bench.mix import Mix


def value(line: dict, key: str, mix: Mix | None = None):
    """What a line of a run says under `key` of `mix`, or of the engine; None if it is not about that."""
    names = ("requests", "context", "least", "new")
    return line.get(key) if all(line.get(name) == (mix and getattr(mix, name)) for name in names) else None


class Limits(NamedTuple):
    """Seconds at most. A dtype beyond it is stopped, a mix is given up and the next one begins."""

    dtype: int = 600
    mix: int = 120


def measure(
    model: str, dtypes: list[str], mixes: list[Mix], options: dict, limits: Limits, log: Path, restarts: int = 0
) -> Iterator[dict]:
    """Every line that the engines print, as they come. An engine that fails gives a line with `error`.

    dtypes    see kvarn.bench.engine.contender
    options   of vllm.LLM, over those of kvarn.bench.engine.start
    log       folder for what the engines say
    restarts  how often every engine starts again, without mixes, once all have run: in turns, backward and forward
    """
    for dtype in dtypes:
        engine.contender(dtype)
    with tempfile.TemporaryDirectory() as scratch:
        folder, has_weights = shapes.folder_of(model, Path(scratch))
        log.mkdir(parents=True, exist_ok=True)
        asked = {"model": str(folder), "dummy": not has_weights, "options": options, "mix_seconds": limits.mix}
        for dtype in dtypes:
            yield from _run(asked | {"kv_cache_dtype": dtype, "mixes": mixes}, limits.dtype, log / f"{dtype}.log")
        for restart in range(1, restarts + 1):
            for dtype in dtypes[::-1] if restart % 2 else dtypes:
                path = log / f"{dtype}-{restart}.log"
                for line in _run(asked | {"kv_cache_dtype": dtype, "mixes": []}, limits.dtype, path):
                    yield line | {"restart": restart}


def _run(asked: dict, seconds: int, path: Path) -> Iterator[dict]:
    """The lines of one engine, in a process of its own; what it says besides goes to `path`."""
    command = [sys.executable, "-m", "kvarn.bench.engine", json.dumps(asked)]
    failed = False
    with path.open("w") as said, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True) as process:
        late = threading.Event()
        timer = threading.Timer(seconds, lambda: (late.set(), process.kill()))
        timer.start()
        try:
            for printed in process.stdout:
                line = json.loads(printed)
                failed |= "error" in line
                yield line
            status = process.wait()
        finally:
            timer.cancel()
            process.kill()
    if status and not failed:
        reason = f"not done after {seconds} s" if late.is_set() else f"exit status {status}"
        yield {"kv_cache_dtype": asked["kv_cache_dtype"], "error": f"{reason}, see {path}"}


def record(lines: Iterable[dict], model: str, path: Path) -> Iterator[dict]:
    """Passes the lines on, each once it stands in `path` as a JSON line with the date and the model."""
    facts = {"date": datetime.date.today().isoformat(), "kvarn": kvarn.__version__, "bench": "serve", "model": model}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", buffering=1) as out:
        for line in lines:
            out.write(json.dumps(facts | line) + "\n")
            yield line


def table(lines: list[dict], mixes: list[Mix]) -> tuple[list[str], list[list[str]]]:
    """The dtypes, and rows for a reader: what was measured, then a cell for each dtype.

    Ratios are against the first dtype; above 1 is better.
    """
    dtypes = list(dict.fromkeys(line["kv_cache_dtype"] for line in lines))

    def row(title: str, key: str, mix: Mix | None = None) -> list[str]:
        values = _by_dtype(lines, key, mix)
        given_up = {dtype: f"not done in {most:g} s" for dtype, most in _by_dtype(lines, "not_done_s", mix).items()}
        return _row(title, dtypes, values, given_up)

    rows = [row("tokens that fit", "fit_tokens")]
    for mix in mixes:
        rows += [row(f"{mix} prefill, s", "prefill_s", mix), row(f"{mix} step, ms", "step_ms", mix)]
        if mix.least:
            rows.append(row(f"{mix} step, mean, ms", "step_mean_ms", mix))
    again = [line for line in lines if "restart" in line]
    starts = {dtype: [line["start_s"] for line in again if line["kv_cache_dtype"] == dtype] for dtype in dtypes}
    if again:
        medians = {dtype: statistics.median(seconds) for dtype, seconds in starts.items() if seconds}
        rows.append(_row("start again, s", dtypes, medians, {}))
    else:
        rows.append(row("start, caches as found, s", "start_s"))
    return dtypes, rows


def _by_dtype(lines: list[dict], key: str, mix: Mix | None) -> dict:
    return {line["kv_cache_dtype"]: found for line in lines if (found := value(line, key, mix)) is not None}


def _row(title: str, dtypes: list[str], values: dict, otherwise: dict) -> list[str]:
    """Numbers, and how many times better they are than those of the first dtype."""
    first = values.get(dtypes[0])

    def cell(dtype: str) -> str:
        if (mine := values.get(dtype)) is None:
            return otherwise.get(dtype, "-")
        counts = isinstance(mine, int)  # tokens: more is better
        text = f"{mine:,}" if counts else f"{mine:.2f}" if mine >= 1 else f"{mine:.3f}"
        if first is None or dtype == dtypes[0]:
            return text
        return f"{text} ({mine / first if counts else first / mine:.2f}x)"

    return [title, *map(cell, dtypes)]
