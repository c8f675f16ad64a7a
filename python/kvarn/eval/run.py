# SPDX-License-Identifier: Apache-2.0
"""Every row over every context, one file each, so that a run that was stopped goes on where it was.

A file's name is a digest of all it depends on: weights, tokens, cache, and its code. Nothing old is reused.
"""

import ast
import hashlib
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

import kvarn
import kvarn._core
import kvarn.rivals.rounding
from kvarn.eval import measure, text
from kvarn.eval.attention import Cache
from kvarn.eval.caches import Packed, Plain, Simulated
from kvarn.eval.measure import Scores

# The first tile is left out: its tokens are raw in kvarn, and hard to predict for want of context.
FIRST_SCORED = 128


class Runner:
    """Runs the rows of one model on one text and keeps what is done in `work`.

    model     a checkpoint folder, or a .gguf file
    contexts  how many of `length` tokens to cut from the text
    """

    def __init__(self, model: Path, text_file: Path, contexts: int, length: int, work: Path):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        source, options = (model.parent, {"gguf_file": model.name}) if model.is_file() else (model, {})
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        self.tokens = text.contexts(text_file, tokenizer, contexts, length)
        self.model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options).eval()
        config = self.model.config.get_text_config()
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        self.full_layers = [number for number, kind in enumerate(kinds) if kind == "full_attention"]
        self.work = work
        work.mkdir(parents=True, exist_ok=True)
        self._weights = _digest(*([model] if model.is_file() else sorted(model.glob("*.safetensors"))))

    def run(self, cache: Cache, done: Callable[[], None] = lambda: None) -> Scores:
        """Scores of all contexts through `cache`; calls `done` after each."""
        parts = []
        for index, tokens in enumerate(self.tokens):
            kept = self.work / f"{self._key(cache, index)}.npz"
            if not kept.exists():
                hidden = measure.hidden_states(self.model, tokens[:-1], cache)
                scores = measure.compare(self.model, self._reference(index), hidden, tokens, FIRST_SCORED)
                scores.save(partial := kept.with_name("partial.npz"))
                partial.replace(kept)
            parts.append(Scores.load(kept))
            done()
        return Scores.concatenate(parts)

    def _reference(self, index: int) -> torch.Tensor:
        kept = self.work / f"{self._key(Plain(), index)}.npy"
        if not kept.exists():
            hidden = measure.hidden_states(self.model, self.tokens[index][:-1], Plain())
            np.save(partial := kept.with_name("partial.npy"), hidden.numpy())
            partial.replace(kept)
        return torch.from_numpy(np.load(kept))

    def _key(self, cache: Cache, index: int) -> str:
        parts = (self._weights, repr(cache), _code(cache), str(FIRST_SCORED))
        return hashlib.sha256("\n".join(parts).encode() + self.tokens[index].tobytes()).hexdigest()[:32]


def _code(cache: Cache) -> str:
    """What `cache` computes with: the compiled core and its target, or the files of a simulation."""
    if isinstance(cache, Packed):
        return _meaning(type(cache).__module__) + _digest(Path(kvarn._core.__file__)) + kvarn.target()
    if isinstance(cache, Simulated):
        modules = (type(cache).__module__, type(cache.rival).__module__, kvarn.rivals.rounding.__name__)
        return "".join(_meaning(module) for module in modules)
    return _meaning(type(cache).__module__)


@lru_cache
def _meaning(module: str) -> str:
    """A digest of a module's source without comments, layout and docstrings: to reword them costs no new run."""
    tree = ast.parse(Path(sys.modules[module].__file__).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(body := getattr(node, "body", None), list):
            node.body = [line for line in body if not _is_text(line)]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def _is_text(line: ast.stmt) -> bool:
    return isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant)


def _digest(*files: Path) -> str:
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
