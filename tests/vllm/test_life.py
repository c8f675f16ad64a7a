# SPDX-License-Identifier: Apache-2.0
"""What a GPU server does to its cache between requests: idle steps, sleep, offload to host memory."""

import pytest
from engine import CACHE, GPU, GRAPHS, ROW_BY_ROW, Engine, first_difference, ngram

pytestmark = [*GPU, ROW_BY_ROW]


@pytest.mark.parametrize("options", [{}, GRAPHS], ids=["eager", "graphs"])
def test_idle_steps_write_nothing(small_model, prompts, base, options):
    """Data-parallel ranks without work run dummy batches, with block table rows that others left."""
    with Engine(small_model, **options) as engine:
        for i, prompt in enumerate(prompts):
            engine.start(str(i), prompt)
        answers = {}
        while engine.llm.llm_engine.has_unfinished_requests():
            answers |= engine.step()
            engine.llm.collective_rpc("execute_dummy_batch")
    assert first_difference([answers[str(i)] for i in range(len(prompts))], base) is None


@pytest.mark.parametrize("level", [1, 2])
def test_sleep_and_wake(small_model, prompts, base, level):
    """At level 2 vLLM throws weights away, and reads them again."""
    with Engine(small_model, **CACHE, **GRAPHS, enable_sleep_mode=True) as engine:
        before = engine.run(prompts)
        engine.llm.sleep(level=level)
        engine.llm.wake_up()
        if level == 2:
            engine.llm.collective_rpc("reload_weights")
        after, warm = engine.run(prompts), engine.run(prompts)
        assert engine.counters()["hits"] > 1000
    for ours in (before, after, warm):
        assert first_difference(ours, base) is None


@pytest.mark.parametrize("drafts", [0, 4])
def test_offload_to_host_memory(small_model, prompts, base, drafts):
    """Blocks that the GPU had to give up come back from the host."""
    room = {"num_gpu_blocks_override": 26, "kv_offloading_size": 1.0} | (ngram(drafts) if drafts else {})
    with Engine(small_model, **CACHE, **room) as engine:
        runs = [engine.run(prompts) for _ in range(3)]
        assert engine.counters()["external hits"] > 0
    for ours in runs:
        assert first_difference(ours, base) is None
