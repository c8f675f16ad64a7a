# SPDX-License-Identifier: Apache-2.0
"""The answers of every row to every question, one file each, and what share of them is right."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from kvarn.eval import generation, statistics
from kvarn.eval.keys import key, meaning, save
from kvarn.eval.model import Model
from kvarn.eval.rows import Row
from kvarn.eval.tasks import Task

# What answers depend on besides the row's cache.
_CODE = ("kvarn.eval.generation", *(f"kvarn.hf.{name}" for name in ("attention", "layer", "rows", "sequences")))


@dataclasses.dataclass(frozen=True)
class Answers:
    """Of one row to one task, question by question: the texts, whether they are right, and their tokens."""

    texts: list[str]
    right: np.ndarray
    tokens: np.ndarray


class Asker:
    """Asks a model through the caches of rows, `batch` questions at a time, and keeps what is answered in `work`."""

    def __init__(self, model: Model, batch: int, work: Path):
        self.model, self.batch, self.work = model, batch, work
        work.mkdir(parents=True, exist_ok=True)

    def ask(self, task: Task, row: Row, done: Callable[[int], None] = lambda count: None) -> Answers:
        """All answers of a row to a task; calls `done` with the number of questions that are answered anew or known."""
        files = [self._file(task, row, question.prompt) for question in task.questions]
        missing = [index for index, file in enumerate(files) if not file.exists()]
        done(len(files) - len(missing))
        for first in range(0, len(missing), self.batch):
            batch = missing[first : first + self.batch]
            prompts = [task.questions[index].prompt for index in batch]
            given = generation.answers(self.model, row.cache, prompts, task.new_tokens)
            for index, (text, tokens) in zip(batch, given, strict=True):
                answer = json.dumps({"text": text, "tokens": tokens})
                save(files[index], partial(Path.write_text, data=answer, encoding="utf-8"))
            done(len(batch))
        found = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        texts = [answer["text"] for answer in found]
        right = [task.correct(text, question.answer) for text, question in zip(texts, task.questions, strict=True)]
        return Answers(texts, np.array(right), np.array([answer["tokens"] for answer in found]))

    def _file(self, task: Task, row: Row, prompt: str) -> Path:
        parts = str(task.new_tokens), *map(meaning, _CODE), hashlib.sha256(prompt.encode()).hexdigest()
        return self.work / f"{key(self.model, row.cache, 'answer', *parts)}.json"


def describe(answers: Answers, reference: Answers) -> dict:
    """The figures of a row in a result; differences are paired, question by question, with the 16-bit row's."""
    same = [ours == theirs for ours, theirs in zip(answers.texts, reference.texts, strict=True)]
    return {
        "questions": len(answers.texts),
        "right_percent": dataclasses.asdict(statistics.percent(answers.right)),
        "difference_percent": dataclasses.asdict(
            statistics.percent(answers.right.astype(float) - reference.right.astype(float))
        ),
        "lost": int((reference.right & ~answers.right).sum()),
        "won": int((~reference.right & answers.right).sum()),
        "same_text_percent": dataclasses.asdict(statistics.percent(np.array(same))),
        "mean_tokens": float(answers.tokens.mean()),
    }
