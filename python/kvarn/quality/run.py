# SPDX-License-Identifier: Apache-2.0
"""Every cache over every context, one result file each, so that a run that was stopped goes on where it was.

A result's name is a digest of all it depends on: weights, tokens, compiled core, target, cache. Nothing old is reused.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import kvarn
import kvarn._core
from kvarn.quality import measure, text
from kvarn.quality.attention import Cache, Kept, Packed
from kvarn.quality.measure import Scores

LENGTH = 2048
FIRST_SCORED = 128
ENCODERS = ("weighted", "varnorm")


@dataclass(frozen=True)
class Setting:
    """A cache under the name it has in the table."""

    name: str
    bits_per_value: float
    cache: Cache
    contexts: int


@dataclass(frozen=True)
class Result:
    setting: Setting
    scores: Scores


def settings(head_dim: int, kv_heads: int, contexts: int, main: str, main_contexts: int) -> list[Setting]:
    """The rows of the table: 16-bit and fp8 for comparison, then every documented preset with both encoders.

    `main` is the preset whose encoders are told apart most closely: it gets `main_contexts`.
    """
    rows = [
        Setting("bf16", 16, Kept(torch.bfloat16), contexts),
        Setting("fp8 e4m3, scale 1", 8, Kept(torch.float8_e4m3fn), contexts),
        Setting("fp8 e4m3, calibrated scale", 8, Kept(torch.float8_e4m3fn, scaled=True), contexts),
    ]
    presets = kvarn.presets()
    if main not in presets:
        raise ValueError(f"{main!r} is not a documented preset; choose one of {', '.join(presets)}")
    for preset in presets:
        layout = kvarn.Layout(preset, head_dim=head_dim, kv_heads=kv_heads)
        for encoder in ENCODERS:
            count = main_contexts if preset == main else contexts
            rows.append(Setting(f"{preset} {encoder}", layout.bits_per_value, Packed(preset, encoder), count))
    return rows


class Runner:
    """Runs settings of one model on one text and keeps what is done in `work`."""

    def __init__(self, model_folder: Path, text_file: Path, contexts: int, work: Path, length: int = LENGTH):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokens = text.contexts(text_file, AutoTokenizer.from_pretrained(model_folder), contexts, length)
        self.model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
        self.work = work
        work.mkdir(parents=True, exist_ok=True)
        weights = sorted(model_folder.glob("*.safetensors"))
        self._common = _digest(*weights, Path(kvarn._core.__file__)) + kvarn.target()

    def run(self, setting: Setting, done: Callable[[], None] = lambda: None) -> Result:
        """Scores of `setting` over its contexts; calls `done` after each."""
        parts = []
        for index in range(setting.contexts):
            kept = self.work / f"{self._key(setting.cache, index)}.npz"
            if not kept.exists():
                tokens = self.tokens[index]
                hidden = measure.hidden_states(self.model, tokens[:-1], setting.cache)
                scores = measure.compare(self.model, self._reference(index), hidden, tokens, FIRST_SCORED)
                scores.save(partial := kept.with_name("partial.npz"))
                partial.replace(kept)
            parts.append(Scores.load(kept))
            done()
        return Result(setting, Scores.concatenate(parts))

    def _reference(self, index: int) -> torch.Tensor:
        kept = self.work / f"{self._key(Kept(), index)}.npy"
        if not kept.exists():
            hidden = measure.hidden_states(self.model, self.tokens[index][:-1], Kept())
            np.save(partial := kept.with_name("partial.npy"), hidden.numpy())
            partial.replace(kept)
        return torch.from_numpy(np.load(kept))

    def _key(self, cache: Cache, index: int) -> str:
        parts = (self._common, repr(cache), str(FIRST_SCORED))
        return hashlib.sha256("\n".join(parts).encode() + self.tokens[index].tobytes()).hexdigest()[:32]


def _digest(*files: Path) -> str:
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
