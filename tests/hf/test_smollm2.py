"""kvarn.hf.Cache on a real model: SmolLM2-135M-Instruct in float32."""

import os

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from models import generate, kvarn_cache, logits, needs_5  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache  # noqa: E402

pytestmark = needs_5  # its tokenizer's file is of transformers 5

FACTS = "The library opens at nine. The password of the reading room is walnut. Tea is served at four. "
FILLER = "Rain fell on the harbour all night, and the boats stayed in. "
QUESTION = "What is the password of the reading room?"


@pytest.fixture(scope="module")
def folder():
    if folder := os.environ.get("KVARN_TEST_MODEL"):
        return folder
    from kvarn.demo.model import smollm2

    return smollm2()


@pytest.fixture
def model(folder, device):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(device)


@pytest.fixture
def chat(folder, device):
    """Two conversations of unequal length, padded on the left: ids and mask.

    Of those lengths at which 16 bits prefer every token of the answer by half a nat or more: shorter ones have ties.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": said}], tokenize=False, add_generation_prompt=True)
        for said in (FACTS + 25 * FILLER + QUESTION, FACTS + 16 * FILLER + QUESTION)
    ]
    tokens = tokenizer(texts, return_tensors="pt", padding=True).to(device)
    return tokenizer, tokens.input_ids, tokens.attention_mask


def test_answers_alone_and_padded_and_with_drafts(model, chat):
    if model.config.num_hidden_layers < 30:
        pytest.skip("only the whole model knows the password")
    tokenizer, ids, mask = chat
    both = generate(model, ids, kvarn_cache(model.config, preset="kvarn_k4v4_g128"), mask=mask, new=24)
    exact = generate(model, ids, DynamicCache(config=model.config), mask=mask, new=24)
    answers, expected = (
        tokenizer.batch_decode(tokens[:, ids.shape[1] :], skip_special_tokens=True) for tokens in (both, exact)
    )
    assert answers == expected
    assert all("walnut" in answer for answer in answers), answers
    start = int((mask[1] == 0).sum())
    for options in ({}, {"prompt_lookup_num_tokens": 8}):
        cache = kvarn_cache(model.config, preset="kvarn_k4v4_g128")
        one = generate(model, ids[1:, start:], cache, new=24, **options)
        answer = tokenizer.decode(one[0, ids.shape[1] - start :], skip_special_tokens=True)
        assert answer == answers[1]


def test_close_to_16_bit(model, chat):
    _, ids, _ = chat
    exact = logits(model, ids[:1], DynamicCache(config=model.config))[0, 128:].log_softmax(-1)
    for preset, allowed in (("kvarn_k8v4_g128", 0.02), ("kvarn_k4v2_g128", 0.15)):
        ours = logits(model, ids[:1], kvarn_cache(model.config, preset=preset))[0, 128:].log_softmax(-1)
        divergence = (exact.exp() * (exact - ours)).sum(-1).mean()
        assert 0 < divergence < allowed, f"{preset}: {divergence:.4f}"
