# SPDX-License-Identifier: Apache-2.0
"""The loops of `kvarn eval`: a model, its rows, a bar, and a JSON file that grows row by row."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import kvarn
from kvarn.cli import model_config
from kvarn.cli.console import out
from kvarn.demo.model import cache_directory, smollm2
from kvarn.eval import report, results, tasks
from kvarn.eval.answers import Asker, describe
from kvarn.eval.attention import Past
from kvarn.eval.generation import can_generate
from kvarn.eval.model import Model
from kvarn.eval.rows import EXACT, Row, own_layers, rows
from kvarn.eval.run import FIRST_SCORED, Runner

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def text_run(path, text, name, contexts, length, only, own, past, device, dtype, where, work) -> None:
    """kvarn eval run; arguments as there."""
    if past not in (pasts := [kind.value for kind in Past]):
        raise ValueError(f"--past is {past!r}; it must be one of {', '.join(pasts)}")
    model, facts = load(path, name, device, dtype)
    runner = Runner(model, text, contexts, length, Past(past), folder(work))
    facts |= {"text": text.name, "context": length, "contexts": contexts, "first_scored": FIRST_SCORED, "past": past}
    asked = _rows(model, facts, only, own)
    result = results.Result(facts)
    with progress(len(asked) * contexts) as advance:
        for row in asked:
            result.add(row, runner.run(row.cache, lambda name=row.name: advance(name)))
            if row is asked[0]:
                out.print(f"{report.perplexity(result.describe())}{facts['text_by']}", highlight=False)
            results.write(result.describe(), where)
            mean, median = result.rows[-1]["mean"], result.rows[-1]["median"]
            out.print(f"{row.name}: mean KLD {mean['value']:.5f}, median {median['value']:.5f}", highlight=False)
    out.print(f"written: {where}; kvarn eval report {where} draws it", markup=False, highlight=False)


def task_run(path, name, names, data, questions, batch, only, own, device, dtype, where, work) -> None:
    """kvarn eval ask; arguments as there."""
    asked = tasks.tasks(data, [name.strip() for name in names.split(";")], questions)
    model, facts = load(path, name, device, dtype)
    chosen = _rows(model, facts, f"{EXACT};{only}", own)
    chosen = [row for row in chosen if can_generate(row.cache)]  # the exact one is the first of all rows
    asker = Asker(model, batch, folder(work))
    told = [
        {"name": t.name, "source": t.source, "questions": len(t.questions), "new_tokens": t.new_tokens} for t in asked
    ]
    result = results.about(facts) | {"batch": batch, "tasks": told, "rows": []}
    exact = {}
    with progress(len(chosen) * sum(len(task.questions) for task in asked)) as advance:
        for row in chosen:
            found = {}
            shown = {"name": row.name, "kind": row.kind, "bits_per_value": row.bits_per_value, "tasks": found}
            result["rows"].append(shown)
            for task in asked:
                about = f"{row.name}, {task.name}"
                given = asker.ask(task, row, lambda count, about=about: advance(about, count))
                found[task.name] = describe(given, exact.setdefault(task.name, given))
                results.write(result, where)
                right = found[task.name]["right_percent"]["value"]
                out.print(f"{about}: {right:.1f} % right", highlight=False)
    out.print(f"written: {where}; kvarn eval report {where} tabulates it", markup=False, highlight=False)


def load(path: Path | None, name: str | None, device: str, dtype: str) -> tuple[Model, dict]:
    """The model, and what a result says of it."""
    if device not in ("cpu", "cuda"):
        raise ValueError(f"--device is {device!r}; it must be cpu or cuda")
    if dtype not in _DTYPES:
        raise ValueError(f"--dtype is {dtype!r}; it must be one of {', '.join(_DTYPES)}")
    # Asked now: what is committed while this runs was not measured.
    commit = results.commit()
    model = Model(smollm2() if path is None else path, device, _DTYPES[dtype])
    shape = model_config.parse(model.net.config.to_dict(), str(model.path))
    return model, {
        "commit": commit,
        "model": name or ("SmolLM2-135M-Instruct" if path is None else model.path.stem),
        "origin": _origin(model.path),
        "layers": shape.full_layers + shape.window_layers + shape.other_layers,
        "packed_layers": shape.full_layers,
        "head_dim": shape.head_dim,
        "kv_heads": shape.kv_heads,
        "where": model.where,
        "text_by": model.text_by,
        "target": torch.cuda.get_device_name() if model.device.type == "cuda" else kvarn.target(),
    }


def _rows(model: Model, facts: dict, only: str, own: Path | None) -> list[Row]:
    """own: a file of kvarn eval layers, or None."""
    full = model_config.full_layers(model.net.config.to_dict())
    shape = facts["head_dim"], facts["kv_heads"], full
    found = rows(*shape, facts["layers"], only, model.feedback)
    if own is not None:
        found.append(own_layers(*shape, *results.layers_of(own), model.feedback()))
    return found


def _origin(model: Path) -> str:
    """Where the weights come from, as far as the folder says so."""
    note = model / "ORIGIN"
    return note.read_text(encoding="utf-8").strip() if note.is_file() else model.name


def folder(work: Path | None) -> Path:
    return work or cache_directory() / "eval"


@contextmanager
def progress(total: int) -> Iterator:
    """A bar; yields advance(description, by)."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), *columns, console=out) as progress:
        task = progress.add_task("", total=total)
        yield lambda description, by=1: progress.update(task, advance=by, description=description)
