# SPDX-License-Identifier: Apache-2.0
"""Models and prompts shared by the tests that run vLLM."""

import json
import os
import shutil
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
LAYERS = 6


@pytest.fixture(scope="session")
def model() -> Path:
    """SmolLM2-135M-Instruct. KVARN_TEST_MODEL: a folder that has it, or its first layers, where there is no network."""
    if folder := os.environ.get("KVARN_TEST_MODEL"):
        return Path(folder)
    from kvarn.demo.model import smollm2

    return smollm2()


@pytest.fixture(scope="session")
def small_model(model, tmp_path_factory) -> Path:
    """Its first six layers: real weights, a fifth of the time."""
    return first_layers(model, LAYERS, tmp_path_factory.mktemp("small_model"))


@pytest.fixture(scope="session")
def draft_model(small_model, tmp_path_factory) -> Path:
    """The first five of these: its drafts are accepted often, not always."""
    return first_layers(small_model, LAYERS - 1, tmp_path_factory.mktemp("draft_model"))


@pytest.fixture(scope="session")
def eagle_head(small_model, tmp_path_factory) -> Path:
    """An EAGLE head for the small model that sees the last token only: its first layer, and a poor guess."""
    import torch
    from safetensors.torch import load_file, save_file

    folder = first_layers(small_model, 1, tmp_path_factory.mktemp("eagle_head"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["EagleLlamaForCausalLM"]}))
    weights = load_file(folder / "model.safetensors")
    layer = {name.removeprefix("model."): w for name, w in weights.items() if _in_layer(name)}
    del layer["layers.0.input_layernorm.weight"]  # an EAGLE head has none
    one = torch.eye(config["hidden_size"], dtype=next(iter(layer.values())).dtype)
    fc = torch.cat([one, torch.zeros_like(one)], dim=1)
    save_file(layer | {"fc.weight": fc}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def first_layers(model: Path, layers: int, folder: Path) -> Path:
    """`model` cut to its first layers, in `folder`."""
    from safetensors.torch import load_file, save_file

    for file in model.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, folder / file.name)
    config = json.loads((model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    weights = load_file(model / "model.safetensors")
    kept = {name: w for name, w in weights.items() if not _in_layer(name) or int(name.split(".")[2]) < layers}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def prompts(small_model) -> list[list[int]]:
    """Eight prompts of 5 to 700 tokens of English text; the last three share their first 300 tokens."""
    from transformers import AutoTokenizer

    text = (REPOSITORY / "docs" / "specification.md").read_text()
    ids = AutoTokenizer.from_pretrained(small_model)(text)["input_ids"]
    lengths = (5, 127, 128, 211, 700)
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    alone = [ids[start : start + length] for start, length in zip(starts, lengths, strict=True)]
    shared = ids[1200:1500]
    return alone + [shared + ids[start : start + length] for start, length in ((1600, 20), (1700, 90), (1800, 333))]


@pytest.fixture(scope="session")
def row_by_row():
    """vLLM's linear layers one row at a time, for all tests from here on."""
    import rowwise

    with pytest.MonkeyPatch.context() as patch:
        rowwise.apply(patch)
        yield


@pytest.fixture(scope="session")
def base(small_model, prompts, row_by_row):
    """The run that others are compared to: all prompts at once, each prefilled whole, no prefix cache."""
    from engine import Engine

    with Engine(small_model) as engine:
        return engine.run(prompts)


def _in_layer(name: str) -> bool:
    return name.startswith("model.layers.")
