# SPDX-License-Identifier: Apache-2.0
"""A model on two workers, GPUs or cores: halves of its heads, or of its layers, near to what one worker says."""

import pytest
import tiny
import torch
from engine import CACHE, GRAPHS, ON_GPU, Engine
from kvarn.vllm.backend import KvarnLayer
from test_models import PRECISE, ROOM, gap, texts  # noqa: F401  (a fixture)

pytestmark = [
    pytest.mark.gpu if ON_GPU else pytest.mark.slow,
    pytest.mark.skipif(ON_GPU and torch.cuda.device_count() < 2, reason="two GPUs"),
]
OPTIONS = PRECISE | CACHE | (ROOM | GRAPHS if ON_GPU else {"num_gpu_blocks_override": 400, "max_model_len": 2048})


@pytest.fixture(autouse=True)
def cores(monkeypatch):
    """vLLM asks which cores a CPU's workers have."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")


@pytest.mark.parametrize("name", tiny.CONFIGS if ON_GPU else ["qwen3", "gemma3"])
def test_halves_of_heads(tmp_path, texts, name):  # noqa: F811
    check(tiny.make(name, tmp_path), texts, tensor_parallel_size=2)


@pytest.mark.skipif(not ON_GPU, reason="vLLM's CPU workers lose requests between two stages, with 16 bits too (0.32)")
def test_halves_of_layers(tmp_path, texts):  # noqa: F811
    check(tiny.make("qwen3", tmp_path), texts, pipeline_parallel_size=2)


def test_stages_see_the_same_queries(tmp_path):
    model, found = tiny.make("qwen3", tmp_path), []
    for stages in 1, 2:
        with Engine(model, **OPTIONS, pipeline_parallel_size=stages) as engine:
            told = engine.llm.collective_rpc(feedback_of)
        assert len(told) == stages and all(told)
        found.append({name: matrix for worker in told for name, matrix in worker.items()})
    alone, halves = found
    assert alone.keys() == halves.keys()
    for name in alone:
        torch.testing.assert_close(halves[name], alone[name], rtol=1e-3, atol=1e-4)


def check(model, texts, **halves) -> None:  # noqa: F811
    with Engine(model, **OPTIONS) as engine:
        alone = engine.run(texts, tokens=12)
    with Engine(model, **OPTIONS, **halves) as engine:
        assert all(engine.llm.collective_rpc(feedback_of))
        cold, warm = engine.run(texts, tokens=12), engine.run(texts, tokens=12)
        assert engine.counters()["hits"] > 0
    same = sum(ours.tokens == one.tokens for ours, one in zip(cold + warm, alone + alone, strict=True))
    print(halves, model, gap(cold, alone), gap(warm, alone), same, "of", 2 * len(alone), "answers the same")
    assert gap(cold, alone) < 0.15 and gap(warm, alone) < 0.15


def feedback_of(worker) -> dict[str, torch.Tensor]:
    """Of each packed layer of a worker, which has half of the heads or of the layers."""
    layers = worker.model_runner.vllm_config.compilation_config.static_forward_context
    packed = {name: x.impl for name, x in layers.items() if isinstance(getattr(x, "impl", None), KvarnLayer)}
    return {name: impl.feedback.matrix.cpu() for name, impl in packed.items()}
