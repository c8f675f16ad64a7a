# SPDX-License-Identifier: Apache-2.0
"""What requests a benchmark sends."""

import random
import re
from typing import NamedTuple


class Mix(NamedTuple):
    """`requests` prompts of `context` tokens at once, then `output` decode steps of all of them.

    least  of the shortest prompt, the others evenly between: then requests pass the edges of tiles in different steps,
           as they do in a server. None: all alike, and most steps see nothing of it
    new    tokens at the end of every prompt that the engine has not seen: what is before them it finds in its prefix
           cache, as in the next turn of a chat or an agent. None: it has seen none
    """

    requests: int
    context: int
    output: int
    least: int | None = None
    new: int | None = None

    @classmethod
    def of(cls, text: str) -> "Mix":
        """ "32x16384+40", "64x1921-2048+128", "8x32768:512+30". Raises ValueError for anything else."""
        match = re.fullmatch(r"(\d+)x(?:(\d+)-)?(\d+)(?::(\d+))?\+(\d+)", text)
        requests, least, context, new, output = (n and int(n) for n in match.groups()) if match else [0] * 5
        shortest = context if least is None else least
        if 0 in (requests, least, context, new, output) or shortest > context or (new or 0) >= shortest:
            raise ValueError(
                f"{text!r} is not a mix; write requests x context + output, as in 32x16384+40, prompts of several "
                "lengths as 64x1921-2048+128, and with the last 512 tokens new as 8x32768:512+30"
            )
        return cls(requests, context, output, least, new)

    def prompts(self, vocabulary: int) -> list[list[int]]:
        """Random tokens, the same for every engine."""
        draw = random.Random(self.requests * 1_000_003 + self.context)
        least, steps = self.least or self.context, max(1, self.requests - 1)
        lengths = [least + (self.context - least) * i // steps for i in range(self.requests)]
        return [[draw.randrange(2, vocabulary - 2) for _ in range(length)] for length in lengths]

    def __str__(self) -> str:
        least, new = f"{self.least}-" if self.least else "", f":{self.new}" if self.new else ""
        return f"{self.requests}x{least}{self.context}{new}"
