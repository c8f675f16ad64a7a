"""What kvarn.hf cannot serve is refused with the reason, and nothing is answered wrongly."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from kvarn.hf import Cache  # noqa: E402
from kvarn.hf.attention import attention, mask  # noqa: E402
from models import SIZES, generate, kvarn_cache, logits, prompt, tiny  # noqa: E402


def config(family: str, **changes):
    return getattr(transformers, f"{family}Config")(**{**SIZES, **changes})


@pytest.mark.parametrize(
    "family, changes, error, words",
    [
        ("Llama", {"head_dim": 72}, ValueError, "head_dim"),
        ("DeepseekV3", {}, NotImplementedError, "latent attention"),
        ("T5", {}, NotImplementedError, "encoder-decoder"),
        ("Mistral", {"sliding_window": 64}, NotImplementedError, "nothing to pack"),
        ("Qwen3Next", {}, NotImplementedError, "linear_attention"),
        ("Gemma3nText", {"num_kv_shared_layers": 1}, NotImplementedError, "share keys and values"),
    ],
)
def test_models(family, changes, error, words):
    asked = config(family, **changes)
    with pytest.raises(error, match=words):
        Cache(asked)
    assert asked._attn_implementation != "kvarn", "a refused model is left as it was"


def test_arguments():
    with pytest.raises(ValueError, match="kvarn_k5v5"):
        Cache(config("Llama"), "kvarn_k5v5_g128")
    with pytest.raises(ValueError, match="one of weighted, varnorm"):
        Cache(config("Llama"), encoder="best")
    with pytest.raises(TypeError, match=r"Cache\(model.config\)"):
        Cache(tiny("llama"))
    with pytest.raises(ValueError, match=r"names layer 3; the full-attention layers of llama are \[0, 1, 2\]"):
        Cache(config("Llama"), layers={3: "kvarn_k8v4_g128"})
    with pytest.raises(ValueError, match=r"names layer 0; the full-attention layers of gemma3_text are \[1\]"):
        Cache(tiny("gemma3").config, layers={0: "kvarn_k8v4_g128"})
    with pytest.raises(ValueError, match="in tiles of 64 tokens; those of kvarn_k4v2_g128 have 128"):
        Cache(config("Llama"), layers={0: "kvarn_k8v4_g64"})
    with pytest.raises(ValueError, match="kvarn_k9v9"):
        Cache(config("Llama"), layers={0: "kvarn_k9v9_g128"})


def test_sinks_on_the_cpu():
    model = tiny("gpt_oss", attention="eager")
    with pytest.raises(NotImplementedError, match="sinks are served on CUDA only"):
        logits(model, prompt(1, 10), kvarn_cache(model.config))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_another_attention_with_this_cache(attention):
    model = tiny("llama")
    cache = kvarn_cache(model.config)
    model.set_attn_implementation(attention)
    with pytest.raises(RuntimeError, match=r"set_attn_implementation\('kvarn'\)"):
        logits(model, prompt(1, 10), cache)
    model.set_attn_implementation("kvarn")
    assert logits(model, prompt(1, 10), cache).isfinite().all()


def test_training():
    model, ids = tiny("llama"), prompt(1, 10)
    with pytest.raises(NotImplementedError, match="no_grad"):
        model(ids, past_key_values=kvarn_cache(model.config))
    with pytest.raises(NotImplementedError, match="eval"):
        logits(model.train(), ids, kvarn_cache(model.config))


def test_masks_and_attention_weights():
    model, ids = tiny("llama"), prompt(1, 10)
    full = torch.ones(1, 1, 10, 10, dtype=torch.bool)
    with pytest.raises(NotImplementedError, match="causal masks with padding only"):
        logits(model, ids, kvarn_cache(model.config), attention_mask=full)
    with pytest.raises(NotImplementedError, match="output_attentions"):
        logits(model, ids, kvarn_cache(model.config), output_attentions=True)


@pytest.mark.parametrize("other", [{"local_size": 8}, {"mask_function": lambda batch, head, row, column: row == row}])
def test_masks_that_are_more_than_causal(other):
    model = tiny("llama")
    cache = kvarn_cache(model.config)
    with torch.no_grad():
        q, k, v = (torch.randn(1, heads, 8, 64) for heads in (4, 2, 2))
        keys, values = cache.update(k, v, layer_idx=0)
        module, asked = model.model.layers[0].self_attn, {"batch_size": 1, "q_length": 8, "kv_length": 8}
        with pytest.raises(NotImplementedError, match="causal masks with padding only"):
            attention(module, q, keys, values, mask(**asked, **other))
        assert attention(module, q, keys, values, mask(**asked))[0].shape == (1, 8, 4, 64)


def test_compilation():
    model = tiny("llama")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"torch\.compile"):
        logits(compiled, prompt(1, 10), kvarn_cache(model.config))


def test_a_cache_of_another_batch():
    model = tiny("llama")
    cache = kvarn_cache(model.config)
    generate(model, prompt(2, 10), cache, new=2)
    with pytest.raises(ValueError, match="reset"):
        generate(model, prompt(3, 30), cache, new=2)


def test_more_drafts_than_raw_room():
    model, ids = tiny("llama"), prompt(1, 45).repeat(1, 5)
    cache = kvarn_cache(model.config)
    logits(model, ids, cache)
    logits(model, prompt(1, 80), cache)
    with pytest.raises(ValueError, match="prompt_lookup_num_tokens and num_assistant_tokens at 28 or less"):
        cache.crop(-70)
