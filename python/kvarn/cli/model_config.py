# SPDX-License-Identifier: Apache-2.0
"""What a model's config.json says about its KV cache."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# Where models that also see or hear keep the description of the part that writes text.
TEXT_SECTIONS = ("text_config", "llm_config", "language_config", "thinker_config")
HUB_TIMEOUT_S = 4
FULL, WINDOW, OTHER = "full", "window", "other"


@dataclass(frozen=True)
class ModelShape:
    """Attention of one model: layers by kind, heads, and the longest context it was made for (0: not said)."""

    name: str
    kv_heads: int
    query_heads: int
    head_dim: int
    full_layers: int
    window_layers: int = 0
    window: int = 0
    other_layers: int = 0
    max_context: int = 0


class Unsupported(ValueError):
    """The model's attention has no place in kvarn's pages, or its description cannot be understood."""


def load(model: str) -> ModelShape:
    """The shape of `model`: a config.json, a model folder, or a name on the hub (asked only if it is not cached).

    Raises FileNotFoundError if there is no such description, Unsupported if kvarn cannot serve what it describes.
    """
    path = Path(model)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        path = _from_hub(model)
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Unsupported(f"{path} is not JSON ({error})") from None
    return parse(description, name=model)


def parse(config: Mapping, name: str = "model") -> ModelShape:
    """The shape that the fields of a Hugging Face `config` describe. Raises Unsupported, saying which field and why."""
    for section in TEXT_SECTIONS:
        if isinstance(config.get(section), Mapping):
            return parse(config[section], name)
    if config.get("kv_lora_rank"):
        raise Unsupported(
            f"{name} uses multi-head latent attention (kv_lora_rank {config['kv_lora_rank']}): its cache holds one "
            "latent vector per token, which kvarn does not pack. Serve it with --kv-cache-dtype auto or fp8."
        )
    layers = _layers(config, name)
    query_heads = _number(config, name, "num_attention_heads", "n_head", "n_heads")
    kv_heads = _number(config, name, "num_key_value_heads", "num_kv_heads", default=query_heads)
    hidden = _number(config, name, "hidden_size", "n_embd", "d_model", default=0)
    head_dim = _number(config, name, "head_dim", default=hidden // query_heads)
    kinds = _kinds(config, layers)
    full, windowed, other = (kinds.count(kind) for kind in (FULL, WINDOW, OTHER))
    if not full:
        raise Unsupported(
            f"{name} has no full-attention layer ({windowed} sliding, {other} others): nothing for kvarn to pack"
        )
    return ModelShape(
        name=name,
        kv_heads=kv_heads,
        query_heads=query_heads,
        head_dim=head_dim,
        full_layers=full,
        window_layers=windowed,
        window=int(config.get("sliding_window") or 0) if windowed else 0,
        other_layers=other,
        max_context=_number(config, name, "max_position_embeddings", "n_positions", default=0),
    )


def full_layers(config: Mapping) -> list[int]:
    """The numbers of the layers that attend to everything: those that a cache packs. `config` as for parse."""
    for section in TEXT_SECTIONS:
        if isinstance(config.get(section), Mapping):
            return full_layers(config[section])
    kinds = _kinds(config, _layers(config, "model"))
    return [number for number, kind in enumerate(kinds) if kind == FULL]


def _layers(config: Mapping, name: str) -> int:
    return _number(config, name, "num_hidden_layers", "n_layer", "num_layers", "n_layers")


def _kinds(config: Mapping, layers: int) -> list[str]:
    """What each layer attends to: everything, a window, or it is of another kind (Mamba, linear attention)."""
    kinds = config.get("layer_types") or config.get("layers_block_type")
    if isinstance(kinds, list):
        known = {"full_attention": FULL, "attention": FULL, "sliding_attention": WINDOW}
        return [known.get(kind, OTHER) for kind in kinds]
    if period := config.get("full_attention_interval"):
        return _every(period, OTHER, layers)
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        period = config.get("sliding_window_pattern")
        return _every(period, WINDOW, layers) if isinstance(period, int) and period > 0 else [WINDOW] * layers
    return [FULL] * layers


def _every(period: int, others: str, layers: int) -> list[str]:
    """The last of every `period` layers attends to everything."""
    return [others if (number + 1) % period else FULL for number in range(layers)]


def _number(config: Mapping, name: str, *fields: str, default: int | None = None) -> int:
    for field in fields:
        value = config.get(field)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
        if value is not None:
            raise Unsupported(f"{name}: {field} is {value!r}; a positive integer is expected")
    if default is None:
        raise Unsupported(f"{name}: no {' or '.join(fields)} given; is this a language model's config.json?")
    return default


def _from_hub(name: str) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError

    try:
        cached = huggingface_hub.try_to_load_from_cache(name, "config.json")
        if isinstance(cached, str):
            return Path(cached)
        huggingface_hub.HfApi().model_info(name, timeout=HUB_TIMEOUT_S)
        return Path(huggingface_hub.hf_hub_download(name, "config.json"))
    except HFValidationError:
        reason = "it is no name on the hub either"
    except Exception as error:  # no network, no such model, no permission: for the user all the same
        reason = f"the hub did not give it ({type(error).__name__})"
    raise FileNotFoundError(
        f"{name!r} is no config.json and no model folder, and {reason}. Give the path of a config.json."
    )
