# SPDX-License-Identifier: Apache-2.0
"""`kvarn bench serve`: mixes, shapes, the table and the picture; engines are stand-ins."""

import json
import xml.etree.ElementTree as ElementTree

import pytest
from kvarn.bench import picture, serve, shapes
from kvarn.cli import commands
from typer.testing import CliRunner

MIX = serve.Mix(64, 2048, 48)
LINES = [
    {"kv_cache_dtype": "auto", "start_s": 24.0, "fit_tokens": 791312},
    {"kv_cache_dtype": "auto", "requests": 64, "context": 2048, "output": 48, "prefill_s": 3.3, "step_ms": 10.4},
    {"kv_cache_dtype": "kvarn_k4v2_g128", "start_s": 25.0, "fit_tokens": 3165248},
    {"kv_cache_dtype": "kvarn_k4v2_g128", "requests": 64, "context": 2048, "output": 48, "prefill_s": 3.0,
     "step_ms": 5.2},
    {"kv_cache_dtype": "fp8", "error": "not done after 3 s"},
]  # fmt: skip


@pytest.mark.parametrize(("text", "mix"), [("64x2048+48", MIX), ("1x7+1", serve.Mix(1, 7, 1))])
def test_a_mix(text, mix):
    assert serve.Mix.of(text) == mix


@pytest.mark.parametrize("text", ["", "64x2048", "0x1+1", "x1+1", "1x2+3+4", "-1x2+3"])
def test_not_a_mix(text):
    with pytest.raises(ValueError, match=r"32x16384\+40"):
        serve.Mix.of(text)


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_a_shape_is_a_configuration(tmp_path, name):
    folder, has_weights = shapes.folder_of(name, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    assert not has_weights and config["num_attention_heads"] % config["num_key_value_heads"] == 0


def test_a_model_that_is_neither(tmp_path):
    with pytest.raises(ValueError, match=r"neither a folder nor one of the shapes qwen3-8b"):
        shapes.folder_of("gpt-5", tmp_path)


def test_the_table():
    dtypes, rows = serve.table(LINES, [MIX])
    assert dtypes == ["auto", "kvarn_k4v2_g128", "fp8"]
    assert rows == [
        ["tokens that fit", "791,312", "3,165,248 (4.00x)", "-"],
        ["64x2048 prefill, s", "3.30", "3.00 (1.10x)", "-"],
        ["64x2048 step, ms", "10.40", "5.20 (2.00x)", "-"],
    ]


def test_the_picture():
    drawn = ElementTree.fromstring(picture.draw(LINES, [MIX]))
    texts = [node.text for node in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert {"3,165,248", "5.20", "ms per decode step, 64 x 2,048 tokens (less is better)"} <= set(texts)


def engine(program: str, monkeypatch, tmp_path):
    """The commands run `program` in place of an engine."""
    path = tmp_path / "engine.py"
    path.write_text(program)
    popen = serve.subprocess.Popen
    monkeypatch.setattr(serve.subprocess, "Popen", lambda command, **more: popen([command[0], str(path)], **more))


def test_an_engine_that_dies_and_one_that_hangs(monkeypatch, tmp_path):
    measure = lambda seconds: list(serve.measure("qwen3-8b", ["fp8"], [MIX], {}, seconds, tmp_path / "logs"))  # noqa: E731
    engine('print(\'{"kv_cache_dtype": "fp8"}\'); raise SystemExit(3)', monkeypatch, tmp_path)
    assert "exit status 3" in measure(60)[1]["error"]
    engine("import time; time.sleep(60)", monkeypatch, tmp_path)
    assert "not done after 1 s" in measure(1)[0]["error"]


def test_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr(serve, "measure", lambda *_: iter(LINES))
    monkeypatch.setattr(serve, "record", lambda lines, model, path: path.write_text(json.dumps(lines)))
    results = tmp_path / "out" / "serve.jsonl"
    results.parent.mkdir()
    asked = ["bench", "serve", "qwen3-8b", "--mixes", "64x2048+48", "--results", str(results)]
    ran = CliRunner().invoke(commands.app, asked)
    assert ran.exit_code == 1 and "fp8: not done after 3 s" in ran.output and "(4.00x)" in ran.output
    assert results.with_suffix(".svg").exists()
    bad = CliRunner().invoke(commands.app, ["bench", "serve", "qwen3-8b", "--mixes", "many"])
    assert bad.exit_code == 1 and "is not a mix" in bad.output
