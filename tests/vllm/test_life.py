# SPDX-License-Identifier: Apache-2.0
"""What a GPU server does to its cache between requests: idle steps, sleep, offload to host memory."""

import pytest
from engine import GRAPHS, ON_GPU, Engine, first_difference, ngram
from vllm import SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not ON_GPU, reason="vLLM's CUDA platform"),
    pytest.mark.usefixtures("row_by_row"),
]
CACHE = {"enable_prefix_caching": True}


@pytest.mark.parametrize("options", [{}, GRAPHS], ids=["eager", "graphs"])
def test_idle_steps_write_nothing(small_model, prompts, base, options):
    """Data-parallel ranks without work run dummy batches, with block table rows that others left."""
    with Engine(small_model, **options) as engine:
        core = engine.llm.llm_engine
        params = SamplingParams(temperature=0.0, max_tokens=70, ignore_eos=True, logprobs=0, detokenize=False)
        for i, prompt in enumerate(prompts):
            core.add_request(str(i), {"prompt_token_ids": prompt}, params)
        answers = {}
        while core.has_unfinished_requests():
            for output in core.step():
                if output.finished:
                    answers[int(output.request_id)] = engine.answer(output)
            engine.llm.collective_rpc("execute_dummy_batch")
    assert first_difference([answers[i] for i in range(len(prompts))], base) is None


@pytest.mark.parametrize("level", [1])
def test_sleep_and_wake(small_model, prompts, base, level):
    with Engine(small_model, **CACHE, **GRAPHS, enable_sleep_mode=True) as engine:
        before = engine.run(prompts)
        engine.llm.sleep(level=level)
        engine.llm.wake_up()
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
