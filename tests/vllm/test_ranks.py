# SPDX-License-Identifier: Apache-2.0
"""Two data-parallel ranks of a mixture of experts, a GPU each: near to what one engine says. They step together, so
that the rank with fewer requests runs idle steps beside the other's."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from engine import CACHE, GPU, GRAPHS, Answer, Engine
from test_models import PRECISE, ROOM, gap, texts  # noqa: F401  (a fixture)

pytestmark = [*GPU, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs")]
OPTIONS = PRECISE | ROOM | CACHE
SHARES = (slice(0, 13), slice(13, 16))  # of the prompts
TIMEOUT_S = 300


@pytest.mark.parametrize("options", [{"enforce_eager": True}, GRAPHS], ids=["eager", "graphs"])
@pytest.mark.parametrize("name", ["gpt-oss", "qwen3-next"])
def test_two_ranks(tmp_path, texts, name, options):  # noqa: F811
    model = tiny.make(name, tmp_path / "model")
    with Engine(model, **OPTIONS, **options) as engine:
        alone = engine.run(texts, tokens=12)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [start(rank, port, model, texts[share], OPTIONS | options, tmp_path) for rank, share in enumerate(SHARES)]
    try:
        for rank, process in enumerate(ranks):
            assert process.wait(TIMEOUT_S) == 0, (tmp_path / f"{rank}.log").read_text()[-4000:]
    finally:
        for process in ranks:
            process.kill()
    for rank, share in enumerate(SHARES):
        assert "kvarn: looked at the model's queries" in (tmp_path / f"{rank}.log").read_text()
        written = json.loads(_answers(tmp_path, rank).read_text())
        told = [Answer(tuple(answer["tokens"]), tuple(answer["logprobs"])) for answer in written]
        cold, warm = told[: len(told) // 2], told[len(told) // 2 :]
        print("two ranks", name, rank, gap(cold, alone[share]), gap(warm, alone[share]))
        assert gap(cold, alone[share]) < 0.15 and gap(warm, alone[share]) < 0.15


def start(rank: int, port: int, model: Path, prompts, options: dict, folder: Path) -> subprocess.Popen:
    place = {"VLLM_DP_RANK": rank, "VLLM_DP_SIZE": 2, "VLLM_DP_MASTER_IP": "127.0.0.1", "VLLM_DP_MASTER_PORT": port}
    asked = {"model": str(model), "prompts": prompts, "options": options, "answers": str(_answers(folder, rank))}
    with (folder / f"{rank}.log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("rank.py")), json.dumps(asked)],
            env=os.environ | {key: str(value) for key, value in place.items()}, stdout=log, stderr=log,
        )  # fmt: skip


def _answers(folder: Path, rank: int) -> Path:
    return folder / f"answers-{rank}.json"
