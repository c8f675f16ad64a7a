# SPDX-License-Identifier: Apache-2.0
"""When a GPU's layers pack what a step completed: all at its end, unless something speaks against it."""

from types import SimpleNamespace

import kvarn
import pytest
import torch
from engine import CACHE, GPU, GRAPHS, ROW_BY_ROW, Engine, first_difference
from kvarn.vllm.pack import Pack

LAYOUT = kvarn.Layout("kvarn_k4v2_g128", 128, 2)


def config(method=None, **additional):
    drafts = None if method is None else SimpleNamespace(method=method)
    return SimpleNamespace(additional_config=additional, speculative_config=drafts)


@pytest.fixture
def packed(monkeypatch):
    """What was packed: the pages of the layers, in order, call by call."""
    calls = []
    monkeypatch.setattr(kvarn.cuda, "pack", lambda plan, layers, encoder: calls.append((layers.pages, encoder)))
    return calls


def layers(count):
    pages = [torch.zeros(3, LAYOUT.page_bytes, dtype=torch.uint8) for _ in range(count)]
    return [SimpleNamespace(pages=p, feedback=None, encoder="weighted") for p in pages]


def test_the_last_layer_of_a_step_packs_for_all(packed):
    some, step = layers(3), SimpleNamespace(layout=LAYOUT)
    pack = Pack.of(some, config())
    for _ in range(2):
        pack.check()
        for _ in some:
            assert len(packed) in (0, 1)
            pack.ran(step)
        (pages, encoder) = packed.pop()
        assert all(p is layer.pages for p, layer in zip(pages, some, strict=True)) and encoder == "weighted"
    some[1].pages = some[1].pages.clone()  # a cache of new tensors
    for _ in some:
        pack.ran(step)
    assert packed.pop()[0][1] is some[1].pages


def test_a_step_that_ended_early_is_found(packed):
    pack = Pack.of(layers(3), config())
    pack.ran(SimpleNamespace(layout=LAYOUT))
    with pytest.raises(RuntimeError, match="1 of 3 layers ran in a step; set kvarn_pack to layer"):
        pack.check()


def test_who_packs():
    assert Pack.of(layers(2), config("ngram")) is not None
    assert Pack.of(layers(2), config("eagle")) is None, "a draft's layers run more often than the model's"
    assert Pack.of(layers(1), config()) is None
    assert Pack.of(layers(2), config(kvarn_pack="layer")) is None


@GPU[0]
@GPU[1]
@ROW_BY_ROW
class TestOnAGpu:
    @pytest.mark.parametrize("options", [{}, GRAPHS, {"max_num_batched_tokens": 90}], ids=str)
    def test_both_ways_are_the_same(self, small_model, prompts, base, options):
        for how in ("step", "layer"):
            with Engine(small_model, **options, additional_config={"kvarn_pack": how}) as engine:
                runner = engine.llm.llm_engine.model_executor.driver_worker.model_runner
                (builder,) = (group.get_metadata_builder() for groups in runner.attn_groups for group in groups)
                assert (builder.pack is not None) == (how == "step")
                assert first_difference(engine.run(prompts), base) is None, how

    @pytest.mark.parametrize("options", [{}, GRAPHS], ids=["eager", "graphs"])
    def test_a_hit_in_the_step_that_fills_a_block(self, small_model, prompts, options):
        """A request whose prompt is what another has and will have: it finds the block that the other completes."""
        prompt = [token for some in prompts for token in some][:250]
        with Engine(small_model, **options, async_scheduling=False) as engine:
            (one,) = engine.run([prompt], tokens=20)
            history = [*prompt, *one.tokens][:257]
            (alone,) = engine.run([history], tokens=20)
        with Engine(small_model, **options, **CACHE, async_scheduling=False) as engine:
            engine.start("one", prompt, tokens=20)
            answers = {}
            for _ in range(6):  # the prompt, then tokens 250 to 254
                answers |= engine.step()
            before = engine.counters()["hits"]
            engine.start("two", history, tokens=20)  # one row, beside token 255 of the first
            while engine.llm.llm_engine.has_unfinished_requests():
                answers |= engine.step()
            assert engine.counters()["hits"] - before == 256
        assert first_difference([answers["one"], answers["two"]], [one, alone]) is None
