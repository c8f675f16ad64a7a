# SPDX-License-Identifier: Apache-2.0
"""Every row over every context, one file each, so that a run that was stopped goes on where it was."""

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from kvarn.eval import measure, text
from kvarn.eval.attention import Cache, Past
from kvarn.eval.caches import Plain
from kvarn.eval.keys import key, save
from kvarn.eval.measure import Scores
from kvarn.eval.model import Model

# The first tile is left out: its tokens are raw in kvarn, and hard to predict for want of context.
FIRST_SCORED = 128


class Runner:
    """Runs the rows of one model on one text and keeps what is done in `work`.

    contexts  how many of `length` tokens to cut from the text
    past      what the past of a token is made from, see attention.Past
    """

    def __init__(self, model: Model, text_file: Path, contexts: int, length: int, past: Past, work: Path):
        self.model, self.past, self.work = model, past, work
        self.tokens = text.contexts(text_file, model.tokenizer, contexts, length)
        work.mkdir(parents=True, exist_ok=True)

    def parted(self, first: int) -> tuple["Runner", "Runner"]:
        """One with the first contexts, and one with the others."""
        parts = copy.copy(self), copy.copy(self)
        for part, tokens in zip(parts, np.split(self.tokens, [first]), strict=True):
            part.tokens = tokens
        return parts

    def run(self, cache: Cache, done: Callable[[], None] = lambda: None) -> Scores:
        """Scores of all contexts through `cache`; calls `done` after each."""
        parts = []
        for index, tokens in enumerate(self.tokens):
            kept = self.work / f"{self._key(cache, index, self.past)}.npz"
            if not kept.exists():
                hidden = measure.hidden_states(self.model.net, tokens[:-1], cache, self.past)
                scores = measure.compare(self.model.net, self._reference(index), hidden, tokens, FIRST_SCORED)
                save(kept, scores.save)
            parts.append(Scores.load(kept))
            done()
        return Scores.stack(parts)

    def _reference(self, index: int) -> torch.Tensor:
        kept = self.work / f"{self._key(Plain(), index, Past.DECODED)}.npy"
        if not kept.exists():
            hidden = measure.hidden_states(self.model.net, self.tokens[index][:-1], Plain())
            save(kept, lambda path: np.save(path, hidden.float().cpu().numpy()))
        return torch.from_numpy(np.load(kept)).to(self.model.device, self.model.net.dtype)

    def _key(self, cache: Cache, index: int, past: Past) -> str:
        return key(self.model, cache, past.value, str(FIRST_SCORED), self.tokens[index].tobytes().hex())
