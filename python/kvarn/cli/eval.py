# SPDX-License-Identifier: Apache-2.0
"""`kvarn eval`: what caches cost in accuracy, measured and drawn."""

from pathlib import Path
from typing import Annotated

import typer

import kvarn
from kvarn.cli.console import fail, out

app = typer.Typer(no_args_is_help=True, help="Accuracy of caches on a real model and text.")

Model = Annotated[Path | None, typer.Option(help="A checkpoint folder or a .gguf file; default SmolLM2-135M-Instruct.")]
Name = Annotated[str | None, typer.Option(help="What to call the model in tables.")]
Rows = Annotated[str, typer.Option(help="Which caches: names with shell wildcards, separated by semicolons.")]
Own = Annotated[Path | None, typer.Option("--layers", help="A file of kvarn eval layers: its choice is one more row.")]
Device = Annotated[str, typer.Option(help="cpu, or cuda: model, kvarn's verbs and the simulations on the GPU.")]
DType = Annotated[str, typer.Option(help="Of weights and activations: float32, bfloat16 or float16.")]
Text = Annotated[Path, typer.Option(help="The text to read.")]
Length = Annotated[int, typer.Option(min=256, help="Tokens of a context.")]
Work = Annotated[Path | None, typer.Option(help="Where finished pieces are kept.")]
# Without k2v2: with it a model whose divergence was 0.7 of k4v2's lost in GSM8K where k4v2 did not (docs/accuracy.md).
_LAYER_PRESETS = [preset for preset in kvarn.presets()[::-1] if preset != "kvarn_k2v2_g128"]
DEFAULT_TEXT = Path("../shared/data/text/wikitext-2-raw.test.txt")


@app.command()
def run(
    model: Model = None,
    text: Text = DEFAULT_TEXT,
    name: Name = None,
    contexts: Annotated[int, typer.Option(min=1, help="How many contexts.")] = 4,
    length: Length = 2048,
    rows: Rows = "*",
    own: Own = None,
    past: Annotated[
        str, typer.Option(help="decoded: errors accumulate over tokens; prompt: the past is an exact prompt's.")
    ] = "decoded",
    device: Device = "cpu",
    dtype: DType = "float32",
    results: Annotated[Path, typer.Option(help="The JSON file to write, after every row.")] = Path("eval.json"),
    work: Work = None,
) -> None:
    """KL divergence, top-1 agreement and perplexity of kvarn's presets and of other formats. A stopped run goes on."""
    from kvarn.cli.eval_run import text_run

    try:
        text_run(model, text, name, contexts, length, rows, own, past, device, dtype, results, work)
    except (ValueError, OSError, RuntimeError, NotImplementedError) as error:
        raise fail(error) from None


@app.command()
def ask(
    task: Annotated[
        str, typer.Option(help="Which tasks: names separated by semicolons.")
    ] = "lines_200;lines_300;keys_75",
    data: Annotated[Path, typer.Option(help="The folder with longctx/ and math/.")] = Path("../shared/data"),
    questions: Annotated[int | None, typer.Option(min=1, help="How many of each task; default all.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Questions that are answered together.")] = 1,
    model: Model = None,
    name: Name = None,
    rows: Rows = "*",
    own: Own = None,
    device: Device = "cpu",
    dtype: DType = "float32",
    results: Annotated[Path, typer.Option(help="The JSON file to write, after every task.")] = Path("answers.json"),
    work: Work = None,
) -> None:
    """Right answers, greedy, of retrieval (lines_200, lines_300, keys_75, passkey) and of gsm8k, paired with 16 bits.

    kvarn's presets run in kvarn.hf.Cache, other formats round each token as it comes. A stopped run goes on.
    """
    from kvarn.cli.eval_run import task_run

    try:
        task_run(model, name, task, data, questions, batch, rows, own, device, dtype, results, work)
    except (ValueError, OSError, RuntimeError, NotImplementedError) as error:
        raise fail(error) from None


@app.command()
def layers(
    bits: Annotated[float, typer.Option(help="Bits per value that all layers may have on average.")],
    presets: Annotated[
        str | None,
        typer.Option(
            help="What a layer may be packed in: names separated by semicolons; default kvarn.presets() but k2v2."
        ),
    ] = None,
    text: Text = DEFAULT_TEXT,
    contexts: Annotated[int, typer.Option(min=1, help="How many contexts to measure every layer on.")] = 1,
    check: Annotated[int, typer.Option(min=1, help="How many others to measure the choice on.")] = 2,
    length: Length = 1024,
    model: Model = None,
    name: Name = None,
    device: Device = "cpu",
    dtype: DType = "float32",
    results: Annotated[Path, typer.Option(help="The JSON file to write.")] = Path("layers.json"),
    work: Work = None,
) -> None:
    """Which layers deserve more bits: the option for vLLM, and what it is worth on other contexts.

    A stopped run goes on.
    """
    from kvarn.cli.eval_layers import layers_run

    try:
        chosen = [preset.strip() for preset in presets.split(";")] if presets is not None else _LAYER_PRESETS
        layers_run(model, text, name, chosen, bits, contexts, check, length, device, dtype, results, work)
    except (ValueError, OSError, RuntimeError, NotImplementedError) as error:
        raise fail(error) from None


@app.command()
def report(
    results: Annotated[list[Path], typer.Argument(help="JSON files of kvarn eval run and ask.")],
    markdown: Annotated[Path, typer.Option(help="The tables.")] = Path("eval.md"),
    svg: Annotated[Path, typer.Option(help="KL divergence against bits per value; texts only.")] = Path("eval.svg"),
    draw: Annotated[str, typer.Option(help="Rows of the picture: names, wildcards allowed, by semicolons.")] = "*",
) -> None:
    """Tables and a picture of one or more runs."""
    from kvarn.eval import picture
    from kvarn.eval import report as reporting
    from kvarn.eval import results as stored

    try:
        found = [stored.read(path) for path in results]
        markdown.write_text("\n".join(reporting.markdown(result) for result in found), encoding="utf-8")
        if texts := [result for result in found if "tasks" not in result]:
            svg.write_text(picture.draw(texts, draw), encoding="utf-8")
    except (ValueError, OSError) as error:
        raise fail(error) from None
    out.print(f"written: {markdown}" + (f" and {svg}" if texts else ""), markup=False, highlight=False)
