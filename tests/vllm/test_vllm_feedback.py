# SPDX-License-Identifier: Apache-2.0
"""Keys rounded for the model's queries (kvarn_feedback): where the feedback of each layer comes from."""

from types import SimpleNamespace

import pytest
import tiny
import torch
from engine import Engine, first_difference
from kvarn import hf
from kvarn.vllm import feedback, refuse
from kvarn.vllm.refuse import Refused
from test_layers import impls
from test_refuse import config
from vllm.model_executor.models.utils import extract_layer_index


def test_the_switch(monkeypatch):
    monkeypatch.delenv("KVARN_FEEDBACK", raising=False)
    assert refuse.feedback_of(config()) == "on"
    assert refuse.feedback_of(config(additional_config={"kvarn_feedback": "off"})) == "off"
    monkeypatch.setenv("KVARN_FEEDBACK", "off")
    assert refuse.feedback_of(config()) == "off"
    with pytest.raises(Refused, match="unknown kvarn feedback 'weights'; allowed are on and off"):
        refuse.feedback_of(config(additional_config={"kvarn_feedback": "weights"}))


def test_a_stage_that_fails_tells_the_next(monkeypatch):
    """Which would wait for it for good."""
    told = []
    stage = SimpleNamespace(is_first_rank=True, is_last_rank=False, send_tensor_dict=told.append)
    monkeypatch.setattr(feedback, "get_pp_group", lambda: stage)
    with pytest.raises(ZeroDivisionError):
        feedback._run(lambda **given: 1 / 0, None, None)
    stage.is_first_rank, stage.recv_tensor_dict = False, told.pop
    with pytest.raises(RuntimeError, match="the pipeline stage before"):
        feedback._run(lambda **given: None, None, None)
    assert told == [{}]


def assert_as_in_transformers(folder, packed, bits=lambda number: 4, **options) -> None:
    """The same as transformers finds, whose modules have other names, fusions and RoPE. bits: of a layer's keys."""
    from transformers import AutoModelForCausalLM

    found = hf.feedback(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    with Engine(folder, dtype="float32", **options) as engine:
        runner = engine.llm.llm_engine.model_executor.driver_worker.model_runner
        layers = runner.vllm_config.compilation_config.static_forward_context
        kept = {extract_layer_index(name): getattr(layer.impl, "feedback", None) for name, layer in layers.items()}
        for layer in layers.values():
            if made := getattr(layer.impl, "feedback", None):
                assert made.matrix is layer.kvarn_feedback and made.balance is layer.kvarn_balance
    assert {number for number, made in kept.items() if made is not None} == packed
    for number in packed:
        expected = found[number].feedback(bits(number))
        assert torch.equal(kept[number].matrix.cpu(), expected.matrix)
        assert (kept[number].balance is None) == (expected.balance is None)
        assert expected.balance is None or torch.equal(kept[number].balance.cpu(), expected.balance)


def test_it_is_that_of_the_checkpoint(small_model):
    assert_as_in_transformers(small_model, {0, 1, 2, 3, 4, 5})


def test_layers_of_their_own_have_that_of_their_bits(small_model):
    own = {"additional_config": {"kvarn_layers": {"1-2": "kvarn_k2v2_g128"}}}
    assert_as_in_transformers(small_model, {0, 1, 2, 3, 4, 5}, lambda number: 2 if number in (1, 2) else 4, **own)


@pytest.mark.parametrize(("name", "packed"), [("qwen3", {0, 1}), ("gemma3", {3})])
def test_norms_of_queries_and_layers_with_windows(tmp_path, name, packed):
    assert_as_in_transformers(tiny.make(name, tmp_path / name), packed)


@pytest.mark.usefixtures("row_by_row")
@pytest.mark.parametrize("options", [{"kvarn_feedback": "off"}, {"kvarn_encoder": "varnorm"}], ids=str)
def test_without(small_model, prompts, options):
    with Engine(small_model) as engine:
        given = engine.run(prompts[3:5])
    with Engine(small_model, additional_config=options) as engine:
        assert [impl.feedback for impl in impls(engine)] == [None] * 6
        assert first_difference(engine.run(prompts[3:5]), given) is not None


def test_a_model_that_cannot_be_run_ahead_is_served_without(small_model, prompts, monkeypatch):
    def fails(*_):
        raise NotImplementedError("no such input")

    said = []
    monkeypatch.setattr(feedback, "_seen", fails)
    monkeypatch.setattr(feedback.logger, "warning_once", lambda text, *given: said.append(text % given))
    with Engine(small_model) as engine:
        assert [impl.feedback for impl in impls(engine)] == [None] * 6
        engine.run(prompts[:1], tokens=2)
    assert said == [
        "kvarn: keys are rounded without feedback, this model could not be run ahead of time: NotImplementedError: "
        "no such input"
    ]


@pytest.mark.slow
def test_a_draft_model_has_none(small_model, draft_model, prompts):
    from engine import drafting

    with Engine(small_model, **drafting("draft_model", draft_model, 2)) as engine:
        runner = engine.llm.llm_engine.model_executor.driver_worker.model_runner
        layers = runner.vllm_config.compilation_config.static_forward_context
        drafts = [layer.impl.feedback for name, layer in layers.items() if name.startswith("draft_model")]
        assert drafts == [None] * 5
        engine.run(prompts[:1], tokens=2)
