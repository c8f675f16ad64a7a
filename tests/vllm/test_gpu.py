# SPDX-License-Identifier: Apache-2.0
"""What a GPU adds to the identity matrix: CUDA graphs, prompts on FlashAttention, prompts of every length."""

import pytest
from engine import CACHE, GPU, GRAPHS, ROW_BY_ROW, Engine, first_difference, ngram

pytestmark = [*GPU, ROW_BY_ROW]


@pytest.fixture
def flash(monkeypatch):
    """Prompts on FlashAttention, as users have it."""
    monkeypatch.setenv("KVARN_PROMPTS", "flash")


@pytest.fixture
def flash_base(small_model, prompts, flash):
    with Engine(small_model) as engine:
        return engine.run(prompts)


@pytest.mark.parametrize("options", [{}, {"num_gpu_blocks_override": 20}, {"max_num_batched_tokens": 90}], ids=str)
def test_graphs(small_model, prompts, base, options):
    with Engine(small_model, **GRAPHS, **options) as engine:
        assert first_difference(engine.run(prompts), base) is None


@pytest.mark.parametrize("drafts", [1, 4, 12])
def test_graphs_that_verify_drafts(small_model, prompts, base, drafts):
    with Engine(small_model, **GRAPHS, **ngram(drafts)) as engine:
        ours = engine.run(prompts)
        assert engine.counters()["accepted"] > 0
    assert first_difference(ours, base) is None


def test_drafts_looked_up_on_the_gpu(small_model, prompts, base):
    """vLLM schedules ahead then, and does not know how long a request is."""
    with Engine(small_model, **GRAPHS, **ngram(4, "ngram_gpu")) as engine:
        assert engine.llm.llm_engine.vllm_config.scheduler_config.async_scheduling
        ours = engine.run(prompts)
        counters = engine.counters()
    assert 0 < counters["accepted"] < counters["drafted"]
    assert first_difference(ours, base) is None


@pytest.mark.parametrize("options", [
    {"max_num_seqs": 1}, {"max_num_batched_tokens": 90}, {"max_num_batched_tokens": 333} | CACHE, GRAPHS,
], ids=str)  # fmt: skip
def test_flash_prompts_in_chunks(small_model, prompts, flash_base, options):
    with Engine(small_model, **options) as engine:
        assert first_difference(engine.run(prompts), flash_base) is None
        assert first_difference(engine.run(prompts), flash_base) is None


def test_flash_and_exact_prompts_agree(base, flash_base):
    """To the precision of bfloat16: two of the prompts leave the first token almost to chance."""
    assert sum(ours.tokens[0] == exact.tokens[0] for ours, exact in zip(flash_base, base, strict=True)) >= 6
    for ours, exact in zip(flash_base, base, strict=True):
        assert abs(ours.logprobs[0] - exact.logprobs[0]) < 0.25


@pytest.mark.parametrize("prompts_on", ["exact", "flash"])
def test_every_prompt_length(small_model, prompts, monkeypatch, prompts_on):
    """Lengths over a whole tile, each without and with a hit of what the run before left."""
    monkeypatch.setenv("KVARN_PROMPTS", prompts_on)
    text = [token for prompt in prompts for token in prompt]
    asked = [text[:length] for length in range(130, 130 + 128)]
    room = {"max_num_seqs": 32, "num_gpu_blocks_override": 1000}
    with Engine(small_model, **GRAPHS, **room) as engine:
        plain = engine.run(asked, tokens=3)
        plain_last = plain[-1]
    with Engine(small_model, **GRAPHS, **room, **CACHE) as engine:
        cold, warm = engine.run(asked, tokens=3), engine.run(asked, tokens=3)
        assert engine.counters()["hits"] > 128 * 128
    if prompts_on == "flash":  # a hit that leaves one row of a prompt leaves it to kvarn's attention
        for answers in (plain, cold, warm):
            last = answers.pop()
            assert last.tokens[0] == plain_last.tokens[0] and abs(last.logprobs[0] - plain_last.logprobs[0]) < 0.05
    assert first_difference(cold, plain) is None
    assert first_difference(warm, plain) is None
