# SPDX-License-Identifier: Apache-2.0
"""Models with random weights, two to four layers each, of the architectures that have other layers beside kvarn's.

Weights are large enough that what a token attends to decides what comes next.
"""

import json
from pathlib import Path

import torch

VOCABULARY = 2048
_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "initializer_range": 0.08,
    "tie_word_embeddings": True,
}
CONFIGS = {
    "qwen3": ("Qwen3Config", {"num_hidden_layers": 2}),
    # Three windowed layers to one full, soft caps off as published.
    "gemma3": (
        "Gemma3TextConfig",
        {
            "num_hidden_layers": 4,
            "sliding_window": 128,
            "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
            "query_pre_attn_scalar": 128,
        },
    ),
    # Every other layer windowed; sinks in all.
    "gpt-oss": (
        "GptOssConfig",
        {
            "num_hidden_layers": 4,
            "sliding_window": 128,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "tie_word_embeddings": False,
        },
    ),
    # Gated delta nets, and one layer of gated attention.
    "qwen3-next": (
        "Qwen3NextConfig",
        {
            "num_hidden_layers": 4,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 64,
            "shared_expert_intermediate_size": 128,
            "tie_word_embeddings": False,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 128,
        },
    ),
}
# What config.json says of weights in four bits; what they are is for load_format="dummy" to say.
QUANTIZED = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
}


def make(name: str, folder: Path, **changes) -> Path:
    """Writes the model `name` of CONFIGS into `folder`; `changes` to what config.json says."""
    import transformers

    kind, differences = CONFIGS[name]
    config = getattr(transformers, kind)(**(_SHAPE | differences))
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if name == "gpt-oss":  # sinks start as they come; logits of this size take most of the probability
        for layer in model.model.layers:
            torch.nn.init.normal_(layer.self_attn.sinks, mean=8.0, std=1.0)
    model.save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(written | changes))
    return folder
