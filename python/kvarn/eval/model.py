# SPDX-License-Identifier: Apache-2.0
"""The model that is measured, on the device and in the dtype that it is measured in."""

import hashlib
from pathlib import Path

import torch

import kvarn


class Model:
    """A checkpoint folder or a .gguf file, ready to run. Raises FileNotFoundError where there is neither.

    net, tokenizer  what transformers makes of it; net in evaluation mode on `device`, its weights of `dtype`
    full_layers     numbers of the layers that attend to everything: those that a cache packs
    where           device and dtype in words: results depend on them
    """

    def __init__(self, path: Path, device: str = "cpu", dtype: torch.dtype = torch.float32):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if not path.exists():
            raise FileNotFoundError(f"no model at {path}; --model takes a checkpoint folder or a .gguf file")
        if device == "cuda" and (missing := kvarn.cuda_missing()):
            raise RuntimeError(missing)
        self.path = path
        source, options = (path.parent, {"gguf_file": path.name}) if path.is_file() else (path, {})
        self.tokenizer = AutoTokenizer.from_pretrained(source, **options)
        self.net = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options).eval().to(device)
        config = self.net.config.get_text_config()
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        self.full_layers = [number for number, kind in enumerate(kinds) if kind == "full_attention"]
        self.where = f"{device} {str(dtype).removeprefix('torch.')}"
        self.weights = digest(*([path] if path.is_file() else sorted(path.glob("*.safetensors"))))

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
