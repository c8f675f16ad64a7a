# SPDX-License-Identifier: Apache-2.0
"""Greedy answers of a batch, through the transformers cache of a row: kvarn.hf.Cache, or one that rounds its tokens."""

from collections.abc import Callable

import torch
from transformers import GenerationConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from kvarn import hf
from kvarn.eval.caches import Layered, Packed, Plain, Simulated
from kvarn.eval.model import Model
from kvarn.rivals import Recent

Rounding = Callable[[torch.Tensor], torch.Tensor]


class _Rounded(DynamicLayer):
    """Every token is rounded as it comes, in the prompt too, and that is what attention reads.

    keys, values  float32 [tokens, kv_heads, head_dim] -> the same, each token by itself
    """

    def __init__(self, keys: Rounding, values: Rounding):
        super().__init__()
        self._roundings = keys, values

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """key_states, value_states [batch, kv_heads, columns, head_dim]; returns those of all columns, rounded."""
        rounded = []
        for through, x in zip(self._roundings, (key_states, value_states), strict=True):
            tokens = through(x.transpose(1, 2).flatten(0, 1).float())
            rounded.append(tokens.unflatten(0, (x.shape[0], -1)).transpose(1, 2).to(x.dtype))
        return super().update(*rounded, *args, **kwargs)


def can_generate(cache) -> bool:
    """Whether `make_cache` can make it: a simulation must round each token by itself, for good."""
    if not isinstance(cache, Simulated):
        return True
    return cache.recent is Recent.NONE and cache.rival.by_token


def make_cache(cache, config) -> Cache:
    """A fresh transformers cache that does in generation what `cache` (kvarn.eval.caches) does in one pass.

    Raises NotImplementedError where can_generate says no.
    """
    if not can_generate(cache):
        raise NotImplementedError(f"{cache} is not simulated in generation: it does not round each token as it comes")
    if isinstance(cache, Packed):
        return hf.Cache(config, cache.preset, cache.encoder, feedback=cache.feedback)
    if isinstance(cache, Layered):
        own = {number: packed.preset for number, packed in cache.own.items()}
        return hf.Cache(config, cache.others.preset, cache.others.encoder, own, cache.others.feedback)
    made = DynamicCache(config=config.get_text_config())
    for number, layer in enumerate(made.layers):
        if type(layer) is not DynamicLayer:
            continue  # sliding windows stay in 16 bits
        if isinstance(cache, Plain):
            made.layers[number] = _Rounded(*2 * [lambda x: x.to(cache.dtype).to(x.dtype)])
        elif cache.rival.packs(number, len(made.layers)):
            made.layers[number] = _Rounded(cache.rival.keys, cache.rival.values)
    return made


def prepared(tokenizer, prompt: str) -> str:
    """The prompt as the model is asked: through its chat template if it has one."""
    if not tokenizer.chat_template:
        return prompt
    asked = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)


@torch.inference_mode()
def answers(model: Model, cache, prompts: list[str], new_tokens: int) -> list[tuple[str, int]]:
    """(text, number of tokens) generated greedily for each of the prompts, which go through the model as one batch."""
    tokenizer = model.tokenizer
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    texts = [prepared(tokenizer, prompt) for prompt in prompts]
    # A chat template has written the tokens that begin a text already.
    special = not tokenizer.chat_template
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=special)
    inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
    # A configuration of its own: checkpoints bring sampling and repetition penalties with theirs.
    settings = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    made = make_cache(cache, model.net.config)
    out = model.net.generate(**inputs, past_key_values=made, generation_config=settings)
    generated = out[:, inputs["input_ids"].shape[1] :].tolist()
    return [_until_end(tokenizer, tokens) for tokens in generated]


def _until_end(tokenizer, tokens: list[int]) -> tuple[str, int]:
    """Text and length, the end token counted and what pads after it left out."""
    if tokenizer.eos_token_id in tokens:
        tokens = tokens[: tokens.index(tokenizer.eos_token_id) + 1]
    return tokenizer.decode(tokens, skip_special_tokens=True), len(tokens)
