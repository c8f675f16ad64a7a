# SPDX-License-Identifier: Apache-2.0
"""`kvarn eval`: what caches cost in accuracy, measured and drawn."""

from pathlib import Path
from typing import Annotated

import typer

from kvarn.cli.console import fail, out

app = typer.Typer(no_args_is_help=True, help="Accuracy of caches on a real model and text.")


@app.command()
def run(
    model: Annotated[
        Path | None, typer.Option(help="A checkpoint folder or a .gguf file; default SmolLM2-135M-Instruct.")
    ] = None,
    text: Annotated[Path, typer.Option(help="The text to read.")] = Path("../shared/data/text/wikitext-2-raw.test.txt"),
    name: Annotated[str | None, typer.Option(help="What to call the model in tables.")] = None,
    contexts: Annotated[int, typer.Option(min=1, help="How many contexts.")] = 4,
    length: Annotated[int, typer.Option(min=256, help="Tokens of a context.")] = 2048,
    rows: Annotated[str, typer.Option(help="Which caches: names with shell wildcards, separated by semicolons.")] = "*",
    results: Annotated[Path, typer.Option(help="The JSON file to write, after every row.")] = Path("eval.json"),
    work: Annotated[Path | None, typer.Option(help="Where finished contexts are kept.")] = None,
) -> None:
    """KL divergence, top-1 agreement and perplexity of kvarn's presets and of other formats. A stopped run goes on."""
    try:
        _run(model, text, name, contexts, length, rows, results, work)
    except (ValueError, OSError, RuntimeError, NotImplementedError) as error:
        raise fail(error) from None


@app.command()
def report(
    results: Annotated[list[Path], typer.Argument(help="JSON files of kvarn eval run.")],
    markdown: Annotated[Path, typer.Option(help="The tables.")] = Path("eval.md"),
    svg: Annotated[Path, typer.Option(help="KL divergence against bits per value.")] = Path("eval.svg"),
) -> None:
    """Tables and a picture of one or more runs."""
    from kvarn.eval import picture
    from kvarn.eval import report as reporting
    from kvarn.eval import results as stored

    try:
        found = [stored.read(path) for path in results]
        markdown.write_text("\n".join(reporting.markdown(result) for result in found), encoding="utf-8")
        svg.write_text(picture.draw(found), encoding="utf-8")
    except (ValueError, OSError) as error:
        raise fail(error) from None
    out.print(f"written: {markdown} and {svg}", markup=False, highlight=False)


def _run(model, text, name, contexts, length, only, path, work) -> None:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from kvarn.cli import model_config
    from kvarn.demo.model import cache_directory, smollm2
    from kvarn.eval import results
    from kvarn.eval.rows import rows
    from kvarn.eval.run import FIRST_SCORED, Runner

    # Asked now: what is committed while this runs was not measured.
    commit = results.commit()
    folder = smollm2() if model is None else model
    if not folder.exists():
        raise FileNotFoundError(f"no model at {folder}; --model takes a checkpoint folder or a .gguf file")
    runner = Runner(folder, text, contexts, length, work or cache_directory() / "eval")
    shape = model_config.parse(runner.model.config.to_dict(), str(folder))
    layers = shape.full_layers + shape.window_layers + shape.other_layers
    facts = {
        "commit": commit,
        "model": name or ("SmolLM2-135M-Instruct" if model is None else folder.stem),
        "origin": _origin(folder),
        "layers": layers,
        "packed_layers": len(runner.full_layers),
        "head_dim": shape.head_dim,
        "kv_heads": shape.kv_heads,
        "text": text.name,
        "context": length,
        "first_scored": FIRST_SCORED,
    }
    asked = rows(shape.head_dim, shape.kv_heads, runner.full_layers, layers, only)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    result = results.Result(facts)
    with Progress(TextColumn("{task.description}"), *columns, console=out) as progress:
        task = progress.add_task("contexts", total=len(asked) * contexts)
        for row in asked:
            progress.update(task, description=row.name)
            result.add(row, runner.run(row.cache, lambda: progress.advance(task)))
            results.write(result.describe(), path)
            mean, median = result.rows[-1]["mean"], result.rows[-1]["median"]
            out.print(f"{row.name}: mean KLD {mean['value']:.5f}, median {median['value']:.5f}", highlight=False)
    out.print(f"written: {path}; kvarn eval report {path} draws it", markup=False, highlight=False)


def _origin(model: Path) -> str:
    """Where the weights come from, as far as the folder says so."""
    note = model / "ORIGIN"
    return note.read_text(encoding="utf-8").strip() if note.is_file() else model.name
