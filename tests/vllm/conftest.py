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
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("small_model")
    for file in model.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, folder / file.name)
    config = json.loads((model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": LAYERS}))
    weights = load_file(model / "model.safetensors")
    kept = {name: w for name, w in weights.items() if not _in_layer(name) or int(name.split(".")[2]) < LAYERS}
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
