# SPDX-License-Identifier: Apache-2.0
"""`kvarn quality`: the quality run with its progress bar."""

from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from kvarn.cli import model_config


def run(
    model: Path | None,
    text: Path,
    contexts: int,
    main_contexts: int,
    main: str,
    root: Path,
    work: Path | None,
    out: Console,
) -> None:
    """Runs every row, writes both reports below `root` and shows the page. A stopped run goes on where it was."""
    from kvarn.demo.model import cache_directory, smollm2
    from kvarn.quality import report, statistics
    from kvarn.quality.run import Runner, settings

    # The main preset is compared on at least what all rows have.
    main_contexts = max(contexts, main_contexts)
    # Asked now: what is committed while this runs was not measured.
    commit = report.commit()
    folder = smollm2() if model is None else model
    shape = model_config.load(str(folder))
    rows = settings(shape.head_dim, shape.kv_heads, contexts, main, main_contexts)
    runner = Runner(folder, text, main_contexts, work or cache_directory() / "quality")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    results = []
    with Progress(*columns, console=out) as progress:
        task = progress.add_task("contexts", total=sum(row.contexts for row in rows))
        for row in rows:
            progress.update(task, description=row.name)
            results.append(runner.run(row, lambda: progress.advance(task)))
            figures = statistics.summary(results[-1].scores)
            out.print(f"{row.name}: mean KLD {figures.mean:.5f}, median {figures.median:.5f}", highlight=False)
    origin = folder / "ORIGIN"
    facts = {
        "commit": commit,
        "model": f"SmolLM2-135M-Instruct ({origin.read_text().strip()})" if origin.is_file() else folder.name,
        "layers": shape.full_layers,
        "head_dim": shape.head_dim,
        "kv_heads": shape.kv_heads,
        "text": text.name,
        "main": main,
    }
    data, page = report.write(results, facts, root)
    out.print(Markdown(page.read_text(encoding="utf-8")))
    out.print(f"written: {page} and {data}", markup=False, highlight=False)
