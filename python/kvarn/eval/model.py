# SPDX-License-Identifier: Apache-2.0
"""The model that is measured, on the device and in the dtype that it is measured in."""

import hashlib
from functools import cached_property
from pathlib import Path

import torch

import kvarn
from kvarn import hf
from kvarn.energy import Seen


class Model:
    """A checkpoint folder or a .gguf file, ready to run. Raises FileNotFoundError where there is neither.

    net, tokenizer  what transformers makes of it; net in evaluation mode on `device`, its weights of `dtype`
    where           device and dtype in words: results depend on them
    text_by         who turned text into tokens, in words: releases of transformers have read the same file differently
    """

    def __init__(self, path: Path, device: str = "cpu", dtype: torch.dtype = torch.float32):
        from transformers import AutoModelForCausalLM, AutoTokenizer, __version__

        if not path.exists():
            raise FileNotFoundError(f"no model at {path}; --model takes a checkpoint folder or a .gguf file")
        if device == "cuda" and (missing := kvarn.cuda_missing()):
            raise RuntimeError(missing)
        self.path = path
        source, options = (path.parent, {"gguf_file": path.name}) if path.is_file() else (path, {})
        self.tokenizer = AutoTokenizer.from_pretrained(source, **options)
        if options:
            self._amend_tokenizer()
        self.net = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options).eval().to(device)
        self.where = f"{device} {str(dtype).removeprefix('torch.')}"
        kind = type(self.tokenizer.backend_tokenizer.model).__name__
        self.text_by = f"{type(self.tokenizer).__name__} ({kind}) of transformers {__version__}"
        self.weights = digest(*([path] if path.is_file() else sorted(path.glob("*.safetensors"))))

    def _amend_tokenizer(self) -> None:
        """What a .gguf file says of the tokens that begin and end texts and transformers leaves out: the former in all
        releases seen, the latter in 5.17, which has <|endoftext|> end Qwen 2.5's answers (5.19 does not).
        """
        from gguf import GGUFReader

        fields = GGUFReader(self.path)
        if (begins := fields.get_field("tokenizer.ggml.add_bos_token")) is not None and begins.contents():
            self.tokenizer.add_bos_token = True
        if (ends := fields.get_field("tokenizer.ggml.eos_token_id")) is not None:
            self.tokenizer.eos_token = self.tokenizer.convert_ids_to_tokens(int(ends.contents()))

    def feedback(self, balanced: bool = True) -> dict[int, Seen]:
        """kvarn.hf.feedback of the model, which runs once for both."""
        return self._seen if balanced else self._unbalanced

    @cached_property
    def _seen(self) -> dict[int, Seen]:
        return hf.feedback(self.net)

    @cached_property
    def _unbalanced(self) -> dict[int, Seen]:
        return {layer: its.unbalanced() for layer, its in self._seen.items()}

    @property
    def device(self) -> torch.device:
        return self.net.device


def digest(*files: Path) -> str:
    """SHA-256 of the files' bytes, one after the other."""
    found = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                found.update(block)
    return found.hexdigest()
