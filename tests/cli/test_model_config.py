# SPDX-License-Identifier: Apache-2.0
"""Shapes of models from the fields their configurations really have."""

import json

import pytest
from kvarn.cli.model_config import ModelShape, Unsupported, full_layers, load, parse

LLAMA = {
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}


def test_head_dim_follows_from_the_hidden_size_when_absent_or_null():
    expected = ModelShape("model", 8, 32, 128, full_layers=32, max_context=131072)
    assert parse(LLAMA) == expected
    assert parse(LLAMA | {"head_dim": None}) == expected
    assert parse(LLAMA | {"head_dim": 64}).head_dim == 64


def test_heads_without_groups():
    shape = parse({"n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024})
    assert (shape.kv_heads, shape.head_dim, shape.full_layers, shape.max_context) == (12, 64, 12, 1024)


def test_text_section_of_a_model_that_also_sees():
    assert parse({"vision_config": {"hidden_size": 1}, "text_config": LLAMA}) == parse(LLAMA)


@pytest.mark.parametrize(
    ("extra", "kinds"),
    [
        ({"layer_types": ["sliding_attention"] * 5 + ["full_attention"], "sliding_window": 512}, (1, 5, 0)),
        ({"layer_types": ["linear_attention"] * 3 + ["full_attention"]}, (1, 0, 3)),
        ({"layers_block_type": ["mamba", "attention", "mamba"]}, (1, 0, 2)),
        ({"full_attention_interval": 4}, (8, 0, 24)),
        ({"sliding_window": 4096, "use_sliding_window": False}, (32, 0, 0)),
        ({"sliding_window": 1024, "sliding_window_pattern": 4}, (8, 24, 0)),
    ],
)
def test_kinds_of_layers(extra, kinds):
    shape = parse(LLAMA | extra)
    assert (shape.full_layers, shape.window_layers, shape.other_layers) == kinds
    assert len(full_layers(LLAMA | extra)) == kinds[0]


def test_numbers_of_full_layers():
    kinds = ["sliding_attention", "full_attention", "linear_attention"]
    assert full_layers({"text_config": LLAMA | {"layer_types": kinds}}) == [1]
    assert full_layers(LLAMA | {"sliding_window": 1024, "sliding_window_pattern": 16}) == [15, 31]
    assert full_layers(LLAMA) == list(range(32))


def test_a_window_is_counted_only_where_layers_slide():
    assert parse(LLAMA | {"sliding_window": 1024, "sliding_window_pattern": 4}).window == 1024
    assert parse(LLAMA | {"sliding_window": 4096, "use_sliding_window": False}).window == 0


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (LLAMA | {"kv_lora_rank": 512}, "latent attention"),
        (LLAMA | {"sliding_window": 4096}, "no full-attention layer"),
        (LLAMA | {"num_key_value_heads": "8"}, "num_key_value_heads is '8'"),
        (LLAMA | {"num_hidden_layers": -1}, "positive integer"),
        ({"hidden_size": 4096}, "language model"),
    ],
)
def test_what_cannot_be_served_is_named(config, says):
    with pytest.raises(Unsupported, match=says):
        parse(config)


def test_load_takes_a_file_or_its_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert load(str(tmp_path)).full_layers == load(str(tmp_path / "config.json")).full_layers == 32


def test_load_says_what_is_wrong_with_a_file(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(Unsupported, match="not JSON"):
        load(str(tmp_path))


def test_load_of_nothing_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match=r"path of a config\.json"):
        load(str(tmp_path / "nowhere"))
