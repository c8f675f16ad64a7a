# SPDX-License-Identifier: Apache-2.0
"""The loops of `kvarn eval`: a model, its rows, a bar, and a JSON file that grows row by row."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from kvarn.cli.console import out
from kvarn.demo.model import cache_directory, smollm2
from kvarn.eval import results
from kvarn.eval.attention import Past
from kvarn.eval.model import Model
from kvarn.eval.rows import rows
from kvarn.eval.run import FIRST_SCORED, Runner

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def text_run(path, text, name, contexts, length, only, past, device, dtype, where, work) -> None:
    """kvarn eval run; arguments as there."""
    if past not in (pasts := [kind.value for kind in Past]):
        raise ValueError(f"--past is {past!r}; it must be one of {', '.join(pasts)}")
    model, facts = _load(path, name, device, dtype)
    runner = Runner(model, text, contexts, length, Past(past), _folder(work))
    facts |= {"text": text.name, "context": length, "contexts": contexts, "first_scored": FIRST_SCORED, "past": past}
    asked = rows(facts["head_dim"], facts["kv_heads"], model.full_layers, facts["layers"], only)
    result = results.Result(facts)
    with _progress(len(asked) * contexts) as advance:
        for row in asked:
            result.add(row, runner.run(row.cache, lambda name=row.name: advance(name)))
            results.write(result.describe(), where)
            mean, median = result.rows[-1]["mean"], result.rows[-1]["median"]
            out.print(f"{row.name}: mean KLD {mean['value']:.5f}, median {median['value']:.5f}", highlight=False)
    out.print(f"written: {where}; kvarn eval report {where} draws it", markup=False, highlight=False)


def _load(path: Path | None, name: str | None, device: str, dtype: str) -> tuple[Model, dict]:
    """The model, and what a result says of it."""
    if device not in ("cpu", "cuda"):
        raise ValueError(f"--device is {device!r}; it must be cpu or cuda")
    if dtype not in _DTYPES:
        raise ValueError(f"--dtype is {dtype!r}; it must be one of {', '.join(_DTYPES)}")
    # Asked now: what is committed while this runs was not measured.
    commit = results.commit()
    model = Model(smollm2() if path is None else path, device, _DTYPES[dtype])
    return model, {"commit": commit, **model.facts(name or ("SmolLM2-135M-Instruct" if path is None else None))}


def _folder(work: Path | None) -> Path:
    return work or cache_directory() / "eval"


@contextmanager
def _progress(total: int) -> Iterator:
    """A bar; yields advance(description)."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), *columns, console=out) as progress:
        task = progress.add_task("", total=total)
        yield lambda description: progress.update(task, advance=1, description=description)
