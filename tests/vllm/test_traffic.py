# SPDX-License-Identifier: Apache-2.0
"""KVARN_TRAFFIC_SECONDS of random traffic: requests come, share prefixes, are given up, are preempted.

In spells of half a minute; after each all pages have to be free again, and a line says what happened so far (-s).
"""

import os
import random
import time

import pytest
from engine import CACHE, GPU, GRAPHS, ROW_BY_ROW, RUNNER, Answer, Engine, first_difference, ngram

pytestmark = [*GPU, ROW_BY_ROW]
SECONDS = float(os.environ.get("KVARN_TRAFFIC_SECONDS", "20"))
MOST = {"max_model_len": 1600, "max_num_seqs": 12, "max_num_batched_tokens": 700}
SPELL = 30  # seconds
STORM = 300  # tokens of an answer
KEPT = 24  # answers that a fresh engine has to repeat


class Traffic:
    """Starts requests at random and keeps a sample of their answers."""

    def __init__(self, engine: Engine, words: list[int], seed: int):
        self.engine, self.core, self.words = engine, engine.llm.llm_engine, words
        self.draw = random.Random(seed)
        self.asked, self.kept, self.number = {}, [], 0
        self.given_up = self.done = self.tokens = 0

    def prompt(self) -> list[int]:
        draw, words = self.draw, self.words
        shared = words[: draw.choice((0, 0, 128, 300, 640))]
        start, length = draw.randrange(len(words) - 800), min(800, int(2 ** draw.uniform(1, 9.6)))
        return shared + words[start : start + length]

    def run(self, until: float) -> None:
        """Starts with a storm: as many requests as run at once, short ones that grow until they push each other out."""
        for _ in range(MOST["max_num_seqs"]):
            self._ask(self.prompt()[-self.draw.randrange(2, 120) :], STORM)
        while time.monotonic() < until or self.core.has_unfinished_requests():
            while time.monotonic() < until and len(self.asked) < 30 and self.draw.random() < 0.5:
                self._ask(self.prompt(), int(2 ** self.draw.uniform(0, 7.5)))
            if self.asked and self.draw.random() < 0.02:
                name = self.draw.choice(list(self.asked))
                self.core.abort_request([name])
                del self.asked[name]
                self.given_up += 1
            for name, answer in self.engine.step().items():
                if name in self.asked:
                    self._finished((*self.asked.pop(name), answer))

    def _ask(self, prompt: list[int], tokens: int) -> None:
        name = str(self.number)
        self.number += 1
        self.asked[name] = (prompt, tokens)
        self.engine.start(name, prompt, tokens)

    def _finished(self, told: tuple[list[int], int, Answer]) -> None:
        self.done += 1
        self.tokens += len(told[0]) + told[1]
        if len(self.kept) < KEPT:
            self.kept.append(told)
        elif self.draw.random() < KEPT / self.done:
            self.kept[self.draw.randrange(KEPT)] = told


@pytest.mark.parametrize(("drafts", "method"), [(0, ""), (4, "ngram"), (4, "ngram_gpu")])
def test_random_traffic(small_model, prompts, drafts, method):
    """With "ngram_gpu" requests come, go and are pushed out while vLLM does not know how long the others are."""
    words = [token for prompt in prompts for token in prompt]
    options = GRAPHS | MOST | (ngram(drafts, method) if drafts else {})
    with Engine(small_model, **options, **CACHE, num_gpu_blocks_override=70) as engine:
        pool = engine.llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
        free = pool.get_num_free_blocks()
        traffic = Traffic(engine, words, seed=drafts + 10 * int(RUNNER))
        title = f"traffic, {drafts} {method} drafts, runner {RUNNER}"
        begun, spells = time.monotonic(), max(1, round(SECONDS / SPELL))
        for spell in range(1, spells + 1):
            traffic.run(begun + SECONDS * spell / spells)
            assert pool.get_num_free_blocks() == free  # no page is left behind
            counters = engine.counters()
            told = f"{traffic.done} answered, {traffic.tokens} tokens, {traffic.given_up} given up, {counters}"
            print(f"{title}, {time.monotonic() - begun:.0f} s: {told}", flush=True)
    assert traffic.done > KEPT and traffic.given_up > 0
    assert counters["preemptions"] > 0 and counters["hits"] > 0
    with Engine(small_model, **MOST) as engine:
        for question, tokens, answer in traffic.kept:
            assert first_difference([answer], engine.run([question], tokens=tokens)) is None
    print(f"{title}: a fresh engine repeats {len(traffic.kept)} answers", flush=True)
