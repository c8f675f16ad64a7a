# SPDX-License-Identifier: Apache-2.0
"""Questions with one right answer each, and the rule by which their source counts an answer right.

`tasks` reads them from a folder with the sources' own files (longctx/, math/). A model with a chat template is asked
through it, without a system prompt of ours; any other model continues the prompt.
"""

import gzip
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Question:
    prompt: str
    answer: str


@dataclass(frozen=True)
class Task:
    """new_tokens: budget of an answer; correct(text, answer): whether a generated text is right."""

    name: str
    source: str
    questions: list[Question]
    new_tokens: int
    correct: Callable[[str, str], bool]


def tasks(folder: Path, names: list[str], most: int | None = None) -> list[Task]:
    """The tasks called `names`, each with its first `most` questions; None: all.

    Raises ValueError for a name that is none, FileNotFoundError where the folder lacks a task's file.
    """
    for name in names:
        if name not in _READERS:
            raise ValueError(f"no task is called {name!r}; there are: {', '.join(_READERS)}")
    made = []
    for name in names:
        task = _READERS[name](folder, name)
        made.append(Task(name, task.source, task.questions[:most], task.new_tokens, task.correct))
    return made


def last_number(text: str) -> str | None:
    """The last number in a text, without thousands separators and trailing zeros of a fraction; None where none is."""
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    if not numbers:
        return None
    whole, _, fraction = numbers[-1].replace(",", "").partition(".")
    return whole if not fraction.strip("0") else f"{whole}.{fraction.rstrip('0')}"


def _lines(folder: Path, name: str) -> Task:
    """A line among 200 or 300, by its name. Source's rule: the last number of the answer is the line's."""
    records = _read(folder / "longctx" / f"longeval_{name}.jsonl")
    questions = [Question(record["prompt"], str(record["expected_number"])) for record in records]
    return Task(name, "LongEval line retrieval (LongChat)", questions, 32, lambda text, is_: last_number(text) == is_)


_KEYS_PROMPT = """Extract the value corresponding to the specified key in the JSON object below.

JSON data:
{data}

Key: "{key}"
Corresponding value:"""


def _keys(folder: Path, name: str) -> Task:
    """A value among 75 UUIDs, by its key. Source's rule: the answer contains the value."""
    questions = []
    for record in _read(folder / "longctx" / "kv-retrieval-75_keys.jsonl.gz"):
        pairs = ",\n ".join(f'"{key}": "{value}"' for key, value in record["ordered_kv_records"])
        prompt = _KEYS_PROMPT.format(data="{" + pairs + "}", key=record["key"])
        questions.append(Question(prompt, record["value"]))
    # Chat models repeat the question first: two UUIDs, each of 25 to 36 tokens where digits are tokens of their own.
    return Task(name, "key-value retrieval (Lost in the Middle)", questions, 160, _contains)


def _passkey(folder: Path, name: str) -> Task:
    """A number of five digits in repeated filler, as KIVI's example asks for it: the answer contains the number."""
    records = _read(folder / "longctx" / "kivi_passkey_examples.jsonl")
    ask = "What is the pass key? The pass key is "
    questions = [Question(record["input"] + ask, record["target"]) for record in records]
    return Task(name, "passkey (KIVI)", questions, 32, _contains)


def _gsm8k(folder: Path, name: str) -> Task:
    """Grade-school problems with a generated chain; right if what is boxed, else the last number, is the answer."""
    ask = "\nPlease reason step by step, and put your final answer within \\boxed{}."
    questions = [
        Question(record["question"] + ask, last_number(record["answer"].rpartition("####")[2]))
        for record in _read(folder / "math" / "gsm8k_test.jsonl")
    ]
    return Task(name, "GSM8K test, no examples", questions, 512, _same_result)


def _contains(text: str, answer: str) -> bool:
    return answer.lower() in text.lower()


def _same_result(text: str, answer: str) -> bool:
    boxed = re.findall(r"\\boxed\{([^{}]*)\}", text)
    return last_number(boxed[-1] if boxed else text) == answer


def _read(path: Path) -> list[dict]:
    if not path.is_file():
        raise FileNotFoundError(f"no {path}; --data takes the folder that holds longctx/ and math/")
    opened = gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8")
    with opened as lines:
        return [json.loads(line) for line in lines]


_READERS: dict[str, Callable[[Path, str], Task]] = {
    "lines_200": _lines,
    "lines_300": _lines,
    "keys_75": _keys,
    "passkey": _passkey,
    "gsm8k": _gsm8k,
}
NAMES = tuple(_READERS)
