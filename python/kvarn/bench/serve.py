# SPDX-License-Identifier: Apache-2.0
"""One engine after the other, each in a process of its own, on the same mixes of requests, and the table."""

import datetime
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
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


class Row(NamedTuple):
    """A cache dtype: what it gave, and how that compares with the first dtype of the run."""

    dtype: str
    cells: list[str]


def table(lines: list[dict], mixes: list[Mix]) -> tuple[list[str], list[Row]]:
    """Columns and rows for a reader; ratios above 1 are better than the first dtype."""
    columns = ["tokens that fit", *(f"{mix} {what}" for mix in mixes for what in ("prefill s", "step ms"))]
    dtypes = list(dict.fromkeys(line["kv_cache_dtype"] for line in lines))

    def value(dtype: str, of: Callable[[dict], float | None]) -> float | None:
        return next((found for line in lines if line["kv_cache_dtype"] == dtype and (found := of(line))), None)

    def in_mix(mix: Mix, key: str) -> Callable[[dict], float | None]:
        return lambda line: line.get(key) if (line.get("requests"), line.get("context")) == mix[:2] else None

    getters = [(lambda line: line.get("fit_tokens"), True)]
    getters += [(in_mix(mix, key), False) for mix in mixes for key in ("prefill_s", "step_ms")]
    rows = []
    for dtype in dtypes:
        cells = []
        for of, more_is_better in getters:
            mine, first = value(dtype, of), value(dtypes[0], of)
            if mine is None:
                cells.append("-")
                continue
            text = f"{mine:,.0f}" if more_is_better else f"{mine:.2f}"
            ratio = "" if first is None or dtype == dtypes[0] else (mine / first if more_is_better else first / mine)
            cells.append(f"{text} ({ratio:.2f}x)" if ratio else text)
        rows.append(Row(dtype, cells))
    return columns, rows
