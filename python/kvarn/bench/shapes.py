# SPDX-License-Identifier: Apache-2.0
"""Shapes of well-known dense models, as the config.json that vLLM needs to run them on dummy weights."""

import json
from pathlib import Path


def _dense(kind: str, hidden: int, layers: int, heads: int, kv_heads: int, inner: int, vocabulary: int, **more) -> dict:
    architecture = {"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}[kind]
    return {
        "architectures": [architecture],
        "model_type": kind,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": inner,
        "vocab_size": vocabulary,
        "rms_norm_eps": 1e-6,
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 1,
    } | more


SHAPES = {
    "qwen3-8b": _dense("qwen3", 4096, 36, 32, 8, 12288, 151936, head_dim=128, max_position_embeddings=40960,
                       rope_theta=1e6, tie_word_embeddings=False),
    "qwen3-0.6b": _dense("qwen3", 1024, 28, 16, 8, 3072, 151936, head_dim=128, max_position_embeddings=40960,
                         rope_theta=1e6, tie_word_embeddings=True),
    "llama-3.1-8b": _dense("llama", 4096, 32, 32, 8, 14336, 128256, head_dim=128, max_position_embeddings=131072,
                           rope_theta=5e5, tie_word_embeddings=False),
    "llama-3.2-1b": _dense("llama", 2048, 16, 32, 8, 8192, 128256, head_dim=64, max_position_embeddings=131072,
                           rope_theta=5e5, tie_word_embeddings=True),
}  # fmt: skip


def folder_of(model: str, scratch: Path) -> tuple[Path, bool]:
    """The folder of a model, and whether it has weights: an existing folder, or a shape written below `scratch`.

    Raises ValueError for a name that is neither.
    """
    if Path(model).is_dir():
        return Path(model), any(Path(model).glob("*.safetensors"))
    if model not in SHAPES:
        raise ValueError(f"{model!r} is neither a folder nor one of the shapes {', '.join(SHAPES)}")
    folder = scratch / model
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SHAPES[model], indent=1))
    return folder, False
