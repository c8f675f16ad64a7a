# SPDX-License-Identifier: Apache-2.0
"""What the demo asks: a chat turn, a question about a long document, two questions that share their beginning.

The documents are articles of WikiText-2 where the evaluation data lie beside the clone, otherwise the log of an
invented lighthouse, made here (so that nothing needs a licence or a download); or any file of the user's.
"""

import random
import re
from dataclasses import dataclass
from pathlib import Path

WIKITEXT = Path("text/wikitext-2-raw.test.txt")


@dataclass(frozen=True)
class Question:
    """`text` is the whole user message; `asked` is the part worth showing."""

    name: str
    asked: str
    text: str
    max_tokens: int = 96


def questions(data: Path, document: Path | None = None) -> list[Question]:
    """The questions in order; the last two share a prefix, so that the second finds its pages in the cache.

    data      the folder of evaluation data; it may be missing
    document  a text file to ask about; it must leave room for the answer in the model's context
    """
    chat = "Name the planets of the solar system, in order from the sun."
    if (data / WIKITEXT).is_file():
        articles = _articles((data / WIKITEXT).read_text(encoding="utf-8"))
        long, about_long = articles["Du Fu"], "When did the An Lushan Rebellion begin, according to the text?"
        prefix, pair = articles["Shackleton ( crater )"], ("Where is the crater?", "Who was the crater named after?")
    else:
        long, about_long = lighthouse_log(130), "What did the keeper give to the fishermen?"
        prefix, pair = lighthouse_log(45, seed=8), ("What is this text about?", "Which birds rested on the rail?")
    if document is not None:
        long, about_long = document.read_text(encoding="utf-8"), "What is this text about? Answer in two sentences."
    return [
        Question("chat turn", chat, chat),
        _about("document", long, about_long),
        _about("shared prefix, cold", prefix, pair[0]),
        _about("shared prefix, cached", prefix, pair[1]),
    ]


def _about(name: str, text: str, asked: str) -> Question:
    return Question(name, asked, f"{text.strip()}\n\n{asked}")


def _articles(text: str) -> dict[str, str]:
    """title -> article of a WikiText file, whose titles are lines of the form " = Title = "."""
    parts = re.split(r"\n = ([^=].*?) = \n", text)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def lighthouse_log(days: int, seed: int = 7) -> str:
    """The same log for the same arguments: about 41 tokens of SmolLM2 a day; something happens two thirds in."""
    draw = random.Random(seed)
    keepers = ("Ingrid", "Olav", "Marit", "Hakon", "Solveig")
    weather = (
        "fog all morning",
        "a hard north wind",
        "clear sky and a calm sea",
        "rain until noon",
        "snow on the rocks",
    )
    birds = ("gulls", "terns", "puffins", "cormorants", "gannets")
    lines = ["Log of the lighthouse at Skarholm", ""]
    for day in range(1, days + 1):
        lines.append(
            f"Day {day}. Keeper {draw.choice(keepers)} had the watch. There was {draw.choice(weather)}. "
            f"The lamp burned {draw.randint(5, 15)} litres of oil. "
            f"{draw.randint(3, 90)} {draw.choice(birds)} rested on the rail."
        )
        if day == days * 2 // 3:
            lines.append(
                "A rowing boat with two fishermen from Bergen came in after dark. They had lost their compass; "
                "the keeper gave them hot soup and his own compass."
            )
    return "\n".join(lines)
