"""Tiny models with random weights, one per kind of attention, and what they answer."""

import functools

import pytest
import torch
import transformers
from kvarn.hf import Cache

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
needs_5 = pytest.mark.skipif(VERSION < (5, 0), reason="transformers 4 has no such thing, or has it with a flaw")
needs_5_19 = pytest.mark.skipif(VERSION < (5, 19), reason="up to 5.17 transformers has it with a flaw")
SIZES = dict(
    hidden_size=128, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    head_dim=64, vocab_size=199, max_position_embeddings=4096, bos_token_id=1, eos_token_id=None, pad_token_id=0,
)  # fmt: skip
WINDOWED = dict(layer_types=["sliding_attention", "full_attention", "sliding_attention"], sliding_window=48)
KINDS = {
    "llama": ("Llama", {}),
    "qwen3": ("Qwen3", {}),
    "gemma3": ("Gemma3", {**WINDOWED, "query_pre_attn_scalar": 64}),
    "gemma2": ("Gemma2", {**WINDOWED, "query_pre_attn_scalar": 64, "attn_logit_softcapping": 3.0}),
    # All experts: which of them a token has would be a choice that one code can turn which rounding, other from a
    # matrix product's shape to another's on a GPU, turns first: 0.2 nats.
    "gpt_oss": ("GptOss", {**WINDOWED, "num_local_experts": 4, "num_experts_per_tok": 4}),
}


def tiny(kind: str, device: str = "cpu", attention: str = "sdpa"):
    """The same weights at each call; float32."""
    family, own = KINDS[kind]
    text = "Text" if family == "Gemma3" else ""
    config = getattr(transformers, f"{family}{text}Config")(**SIZES, **own, attn_implementation=attention)
    torch.manual_seed(5)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for parameter in model.parameters():  # sharper than the usual start, so that no two tokens are nearly as likely
        if parameter.dim() > 1:
            parameter.data.mul_(4)
    if kind == "gpt_oss" and VERSION >= (5, 0):
        # generate() computes experts in one way for drafts and, on a GPU, in another without: 0.2 nats apart here.
        model.set_experts_implementation("eager")
    return model.to(device)


def prompt(*shape: int, seed: int = 1, device: str = "cpu") -> torch.Tensor:
    return torch.randint(2, 199, shape, generator=torch.Generator().manual_seed(seed)).to(device)


def generate(model, ids, cache, new: int = 40, mask=None, **options):
    """Token ids [batch, columns]; greedy unless options say otherwise."""
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"do_sample": False, "max_new_tokens": new, **options}
    return model.generate(ids, attention_mask=mask, past_key_values=cache, **options)


@torch.no_grad()
def logits(model, ids, cache=None, **options) -> torch.Tensor:
    return model(ids, past_key_values=cache, use_cache=cache is not None, **options).logits


def assert_same_answer(model, one: torch.Tensor, other: torch.Tensor) -> None:
    """Equal token ids (no padding), or where they part, two tokens that are as likely within 5 %: matrix products of
    another shape round otherwise, also in 16-bit models."""
    if one.shape == other.shape and torch.equal(one, other):
        return
    first = int((one != other).nonzero()[0])
    likely = logits(model, one[None, :first], kvarn_cache(model.config))[0, -1].log_softmax(-1)
    apart = float(likely[one[first]] - likely[other[first]])
    assert abs(apart) < 0.05, f"token {first}: {one[first]} and {other[first]} are {apart:.3f} apart"


kvarn_cache = functools.partial(Cache, preset="kvarn_k4v2_g128")
