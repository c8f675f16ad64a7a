# SPDX-License-Identifier: Apache-2.0
"""One engine after the other, each in a process of its own, on the same mixes of requests, and the table."""

import datetime
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from kvarn.bench import shapes


class Mix(NamedTuple):
    """`requests` prompts of `context` tokens at once, then `output` decode steps of all of them."""

    requests: int
    context: int
    output: int

    @classmethod
    def of(cls, text: str) -> "Mix":
        """ "32x16384+40". Raises ValueError for anything else."""
        match = re.fullmatch(r"(\d+)x(\d+)\+(\d+)", text)
        if not match or 0 in (numbers := [int(group) for group in match.groups()]):
            raise ValueError(f"{text!r} is not a mix; write requests x context + output, as in 32x16384+40")
        return cls(*numbers)

    def __str__(self) -> str:
        return f"{self.requests}x{self.context}"


def value(line: dict, key: str, mix: Mix | None = None):
    """What a line of a run says under `key` of `mix`, or of the engine; None if it is not about that."""
    about = (mix.requests, mix.context) if mix else (None, None)
    return line.get(key) if (line.get("requests"), line.get("context")) == about else None


def measure(model: str, dtypes: list[str], mixes: list[Mix], options: dict, seconds: int, log: Path) -> Iterator[dict]:
    """Every line that the engines print, as they come. An engine that fails gives a line with `error`.

    options   of vllm.LLM, over those of kvarn.bench.engine.start
    seconds   at most, for one engine
    log       folder for what the engines say
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder, has_weights = shapes.folder_of(model, Path(scratch))
        log.mkdir(parents=True, exist_ok=True)
        for dtype in dtypes:
            asked = {"model": str(folder), "dummy": not has_weights, "kv_cache_dtype": dtype, "mixes": mixes}
            command = [sys.executable, "-m", "kvarn.bench.engine", json.dumps(asked | {"options": options})]
            path = log / f"{dtype}.log"
            lines, failed = [], None
            with path.open("w") as said, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said) as process:
                try:
                    printed, _ = process.communicate(timeout=seconds)
                    failed = f"exit status {process.returncode}" if process.returncode else None
                except subprocess.TimeoutExpired:
                    process.kill()
                    printed, _ = process.communicate()
                    failed = f"not done after {seconds} s"
            lines = [json.loads(line) for line in printed.decode().splitlines()]
            yield from lines
            if failed and not any("error" in line for line in lines):
                yield {"kv_cache_dtype": dtype, "error": f"{failed}, see {path}"}


def record(lines: list[dict], model: str, path: Path) -> None:
    """Writes the lines as JSON lines, each with the date, the machine and the model."""
    import torch
    import vllm

    import kvarn

    facts = {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "vllm": vllm.__version__,
        "kvarn": kvarn.__version__,
        "bench": "serve",
        "model": model,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(facts | line) + "\n" for line in lines))


def table(lines: list[dict], mixes: list[Mix]) -> tuple[list[str], list[list[str]]]:
    """The dtypes, and rows for a reader: what was measured, then a cell for each dtype.

    Ratios are against the first dtype; above 1 is better.
    """
    dtypes = list(dict.fromkeys(line["kv_cache_dtype"] for line in lines))

    def row(title: str, key: str, mix: Mix | None = None) -> list[str]:
        values = {line["kv_cache_dtype"]: found for line in lines if (found := value(line, key, mix)) is not None}
        return [title, *(cell(values.get(dtype), values.get(dtypes[0]), dtype) for dtype in dtypes)]

    def cell(mine: float | None, first: float | None, dtype: str) -> str:
        if mine is None:
            return "-"
        counts = isinstance(mine, int)  # tokens: more is better
        text = f"{mine:,}" if counts else f"{mine:.2f}"
        if first is None or dtype == dtypes[0]:
            return text
        return f"{text} ({mine / first if counts else first / mine:.2f}x)"

    rows = [row("tokens that fit", "fit_tokens")]
    for mix in mixes:
        rows += [row(f"{mix} prefill, s", "prefill_s", mix), row(f"{mix} step, ms", "step_ms", mix)]
    return dtypes, rows
