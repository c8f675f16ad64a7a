# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism on two GPUs: half the heads each, near to what one GPU says."""

import pytest
import tiny
import torch
from engine import CACHE, GPU, GRAPHS, Engine
from kvarn.vllm.backend import KvarnLayer
from test_models import PRECISE, ROOM, gap, texts  # noqa: F401  (a fixture)

pytestmark = [*GPU, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs")]


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_two_gpus(tmp_path, texts, name):  # noqa: F811
    model = tiny.make(name, tmp_path)
    options = PRECISE | ROOM | GRAPHS | CACHE
    with Engine(model, **options) as engine:
        alone = engine.run(texts, tokens=12)
    with Engine(model, **options, tensor_parallel_size=2) as engine:
        assert all(made and all(made) for made in engine.llm.collective_rpc(has_feedback))
        cold, warm = engine.run(texts, tokens=12), engine.run(texts, tokens=12)
        assert engine.counters()["hits"] > 0
    same = sum(ours.tokens == one.tokens for ours, one in zip(cold + warm, alone + alone, strict=True))
    print("two GPUs", name, gap(cold, alone), gap(warm, alone), same, "of", 2 * len(alone), "answers the same")
    assert gap(cold, alone) < 0.15 and gap(warm, alone) < 0.15


def has_feedback(worker) -> list[bool]:
    """Of each packed layer of a rank, which sees half of the query heads."""
    layers = worker.model_runner.vllm_config.compilation_config.static_forward_context.values()
    return [x.impl.feedback is not None for x in layers if isinstance(getattr(x, "impl", None), KvarnLayer)]
