# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism on two GPUs: half the heads each, near to what one GPU says."""

import pytest
import tiny
import torch
from engine import CACHE, GPU, GRAPHS, Engine
from test_models import PRECISE, ROOM, gap, texts  # noqa: F401  (a fixture)

pytestmark = [*GPU, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs")]


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_two_gpus(tmp_path, texts, name):  # noqa: F811
    model = tiny.make(name, tmp_path)
    options = PRECISE | ROOM | GRAPHS | CACHE
    with Engine(model, **options) as engine:
        alone = engine.run(texts, tokens=12)
    with Engine(model, **options, tensor_parallel_size=2) as engine:
        cold, warm = engine.run(texts, tokens=12), engine.run(texts, tokens=12)
        assert engine.counters()["hits"] > 0
    print("two GPUs", name, gap(cold, alone), gap(warm, alone))
    assert gap(cold, alone) < 0.15 and gap(warm, alone) < 0.15
