# SPDX-License-Identifier: Apache-2.0
"""A random Llama of a few thousand weights."""

import torch
import transformers


def llama(seed: int, *, layers: int, heads: int, kv_heads: int, **options):
    """The same weights for the same arguments; float32, head_dim 64, 97 tokens."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=64,
        initializer_range=0.1,
        **options,
    )
    return transformers.LlamaForCausalLM(config).eval()


def save(net, folder) -> None:
    """folder/model, with a tokenizer of one token per word, and folder/text of 700 of its words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({str(i): i for i in range(97)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    net.save_pretrained(folder / "model")
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder / "model")
    (folder / "text").write_text(" ".join(str(i * i % 97) for i in range(700)))
