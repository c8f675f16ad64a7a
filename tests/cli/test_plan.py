# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of `kvarn plan` against figures worked out by hand, and the command itself."""

import json

import kvarn
import pytest
from kvarn.cli.commands import app
from kvarn.cli.model_config import ModelShape, Unsupported
from kvarn.cli.plan import parse_memory, plan
from typer.testing import CliRunner

# Llama 3 8B's attention.
MODEL = ModelShape("model", kv_heads=8, query_heads=32, head_dim=128, full_layers=32, max_context=131072)
GIB = 2**30


def rows(model=MODEL, memory=16 * GIB, context=8192, drafts=0):
    return {row.dtype: row for row in plan(model, memory, context, drafts).rows}


def test_every_dtype_has_a_row():
    assert list(rows()) == ["auto (16-bit)", "fp8", *kvarn.presets()]


def test_sixteen_bit_and_fp8():
    table = rows()
    assert table["auto (16-bit)"].bytes_per_token == 131_072
    assert table["auto (16-bit)"].tokens == 131_072
    assert table["auto (16-bit)"].users == 16
    assert table["fp8"].bytes_per_token == 65_536
    assert table["fp8"].users == 32


def test_k4v2_counts_pages_and_pages_ahead():
    row = rows()["kvarn_k4v2_g128"]
    page = 13_824 * 8 * 32
    assert row.bytes_per_token == page / 128 == 27_648
    assert row.smaller == pytest.approx(4.741, abs=1e-3)
    assert row.tokens == 16 * GIB // page * 128
    assert row.bytes_per_user == (64 + 5) * page
    assert row.users == 16 * GIB // ((64 + 5) * page)


def test_drafts_lengthen_the_request_and_are_refused_beyond_a_page():
    assert rows(drafts=1)["kvarn_k4v2_g128"].bytes_per_user > rows()["kvarn_k4v2_g128"].bytes_per_user
    result = plan(MODEL, 16 * GIB, 8192, drafts=28)
    assert "kvarn_k4v2_g128" not in {row.dtype for row in result.rows}
    assert any("at most 27 drafts" in note for note in result.notes)


def test_sliding_layers_cost_their_window_per_user():
    sliding = ModelShape("model", 8, 32, 128, full_layers=8, window_layers=24, window=1024)
    plain, packed = rows(sliding)["auto (16-bit)"], rows(sliding)["kvarn_k4v2_g128"]
    window = 4 * 8 * 128 * 1024 * 24
    assert plain.bytes_per_user == 8192 * 4 * 8 * 128 * 8 + window
    assert packed.bytes_per_user == (64 + 5) * 13_824 * 8 * 8 + window
    assert any("24 more layers slide" in note for note in plan(sliding, GIB, 8192).notes)


def test_layers_with_a_state_are_named():
    hybrid = ModelShape("model", 8, 32, 128, full_layers=8, other_layers=24)
    assert any("24 more layers keep a state" in note for note in plan(hybrid, GIB, 8192).notes)


def test_a_head_dim_without_kernels_is_refused_with_the_reason():
    with pytest.raises(Unsupported, match="head_dim 72"):
        plan(ModelShape("model", 8, 32, 72, full_layers=32), GIB, 8192)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("16GiB", 16 * GIB),
        ("80 GB", 80 * 10**9),
        ("512mib", 512 * 2**20),
        ("1.5G", 1_500_000_000),
        ("4096", 4096),
        ("1e9", 10**9),
    ],
)
def test_memory_is_read(text, number):
    assert parse_memory(text) == number


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "16 apples", "0", "1.2.3GB", "1iB"])
def test_memory_that_is_none_is_named(text):
    with pytest.raises(ValueError, match="is not an amount"):
        parse_memory(text)


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(
        json.dumps({"hidden_size": 4096, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8})
    )
    return str(path)


def test_command_prints_a_table(config):
    done = CliRunner().invoke(app, ["plan", config, "--memory", "16GiB"])
    assert done.exit_code == 0
    assert "kvarn_k4v2_g128" in done.output
    assert "27,648" in done.output


def test_command_speaks_json(config):
    done = CliRunner().invoke(app, ["plan", config, "--memory", "16GiB", "--context", "4096", "--json"])
    described = json.loads(done.stdout)
    assert described["context"] == 4096
    assert described["model"]["full_layers"] == 32
    assert [row["dtype"] for row in described["rows"]][2:] == kvarn.presets()


def test_command_fails_in_one_sentence(config):
    for arguments in ([config, "--memory", "lots"], [config, "--memory", "1GiB", "--context", "0"]):
        done = CliRunner().invoke(app, ["plan", *arguments])
        assert done.exit_code == 1
        assert "Traceback" not in done.output
        assert done.output.startswith("kvarn: ")
