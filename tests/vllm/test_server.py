# SPDX-License-Identifier: Apache-2.0
"""The OpenAI-compatible server with the flag: several processes, HTTP, streaming."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from engine import PRESET

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
START_TIMEOUT_S = 300


@contextmanager
def serving(command, port, log):
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("wb") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, env=environment)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text(errors="replace")[-4000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                break
            except OSError:
                time.sleep(0.5)
        yield
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def ask(port, path, **body):
    """The response, or the list of its server-sent events."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/{path}",
        json.dumps({"temperature": 0, "max_tokens": 12} | body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        text = response.read().decode()
    if not body.get("stream"):
        return json.loads(text)
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    "command",
    [
        [str(Path(sys.executable).with_name("vllm")), "serve"],
        pytest.param([sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"], marks=pytest.mark.slow),
    ],
    ids=["vllm serve", "api_server"],
)
def test_server(model, command, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--kv-cache-dtype", PRESET, "--max-model-len", "2048", "--enforce-eager", "--port", str(port)]
    log = tmp_path / "server.log"
    with serving([*command, str(model), *options, "--served-model-name", "smol"], port, log):
        whole = ask(port, "chat/completions", model="smol", messages=QUESTION)
        answer = whole["choices"][0]["message"]["content"]
        assert "Paris" in answer
        events = ask(port, "chat/completions", model="smol", messages=QUESTION, stream=True)
        pieces = [event["choices"][0]["delta"].get("content") or "" for event in events]
        assert "".join(pieces) == answer and sum(map(bool, pieces)) > 3
        completion = ask(port, "completions", model="smol", prompt="The capital of France is")
        assert "Paris" in completion["choices"][0]["text"]
    assert f"kv_cache_dtype={PRESET}" in log.read_text()
