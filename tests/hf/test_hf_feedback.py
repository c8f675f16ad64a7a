# SPDX-License-Identifier: Apache-2.0
"""kvarn.hf.feedback: what a model run ahead of time shows, and caches that use it."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import kvarn  # noqa: E402
from kvarn import energy  # noqa: E402
from kvarn.hf import feedback  # noqa: E402
from models import KINDS, kvarn_cache, logits, prompt, tiny  # noqa: E402


@pytest.mark.parametrize("kind", KINDS)
def test_it_belongs_to_the_model_alone(kind):
    model = tiny(kind, attention="eager")
    first = feedback(model)
    assert model.config._attn_implementation == "eager" and not model.training
    kvarn_cache(model.config)
    again = feedback(model.train())
    assert model.config._attn_implementation == "kvarn" and model.training
    assert first.keys() == again.keys() == {0, 1, 2}
    for layer, its in first.items():
        for found, same in ((its.queries, again[layer].queries), (its.keys, again[layer].keys)):
            assert found.shape == (2, 64) and torch.equal(found, same)
            assert torch.equal(found, found.log2().round().exp2())


@torch.no_grad()
def test_attention_gives_zeros():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    model = tiny("llama")
    tokens = energy.tokens(199)[None]
    states, found = model.model.embed_tokens(tokens), feedback(model)
    cos, sin = model.model.rotary_emb(states, torch.arange(energy.TOKENS)[None])
    for number, layer in enumerate(model.model.layers):
        given, attention = layer.input_layernorm(states), layer.self_attn
        query, key = (
            project(given).unflatten(-1, (-1, 64)).transpose(1, 2) for project in (attention.q_proj, attention.k_proj)
        )
        query, key = (x[0].transpose(0, 1) for x in apply_rotary_pos_emb(query, key, cos, sin))
        assert torch.equal(found[number].queries, energy.of_queries(query, 2))
        assert torch.equal(found[number].keys, energy.of_keys(key))
        states = states + layer.mlp(layer.post_attention_layernorm(states))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gemma3", "gemma2", "gpt_oss"])
def test_layers_with_windows_attend(kind):
    model = tiny(kind, attention="eager")
    layers = model.model.layers

    def states(run):
        """What comes out of each layer."""
        found = []
        hooks = [layer.register_forward_hook(lambda _, __, out: found.append(out)) for layer in layers]
        run()
        for hook in hooks:
            hook.remove()
        return found

    ours = states(lambda: feedback(model))
    layers[1].self_attn.o_proj.register_forward_pre_hook(lambda _, given: (torch.zeros_like(given[0]),))
    theirs = states(lambda: model.model(energy.tokens(199)[None], use_cache=False))
    assert len(ours) == len(theirs) == 3
    for mine, own in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, own)


def test_a_cache_rounds_with_it():
    model, ids = tiny("llama"), prompt(1, 300)
    given = feedback(model)
    without, one, other = (
        logits(model, ids, kvarn_cache(model.config, feedback=made)) for made in (None, given, given)
    )
    assert torch.equal(one, other) and torch.equal(one[:, :128], without[:, :128])
    assert not torch.equal(one[:, 128:], without[:, 128:])


def test_a_balanced_cache_is_the_same_but_for_rounding():
    """Of the first tile, which is raw, answers hardly differ. Some channels of these keys deviate more than others."""
    model, ids = tiny("llama"), prompt(1, 300)
    for layer in model.model.layers:
        layer.self_attn.k_proj.weight.data[::8] *= 8
    plain, balanced = feedback(model, balanced=False), feedback(model)
    assert all(its.feedback(4).balance is None for its in plain.values())
    assert any(its.feedback(4).balance is not None for its in balanced.values())
    one, other = (logits(model, ids, kvarn_cache(model.config, feedback=made)) for made in (plain, balanced))
    torch.testing.assert_close(one[:, :128], other[:, :128], rtol=0, atol=2e-2)
    assert not torch.equal(one[:, 128:], other[:, 128:])


def test_it_is_of_the_weighted_encoder():
    model = tiny("llama")
    with pytest.raises(ValueError, match="feedback is for the weighted encoder, not varnorm"):
        kvarn_cache(model.config, encoder="varnorm", feedback=feedback(model))


@pytest.mark.gpu
def test_on_a_gpu():
    if missing := kvarn.cuda_missing():
        pytest.skip(missing)
    model = tiny("llama")
    there = feedback(model.to("cuda"))
    here = feedback(model.to("cpu"))
    pairs = [(getattr(here[layer], its), getattr(there[layer], its)) for layer in here for its in ("queries", "keys")]
    assert min((a == b).float().mean() for a, b in pairs) > 0.9, "but for what is half-way between two powers"
