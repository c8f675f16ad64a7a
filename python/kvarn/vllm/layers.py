# SPDX-License-Identifier: Apache-2.0
"""Presets of their own for some layers: --additional-config '{"kvarn_layers": {"0": "kvarn_k8v4_g128", "2-5": ".."}}'.

Some models have a few layers whose keys need more bits than the others' (docs/accuracy.md). All layers share block ids
and hold as many tokens ahead; each has pages of its own size.
"""

import json

from kvarn.layer_numbers import by_number

from . import PRESETS
from .refuse import Refused, option_of, page_tokens


def asked(config, preset: str) -> dict[int, str]:
    """What a VllmConfig asks for, by layer number, beside `preset`: additional_config["kvarn_layers"], else the JSON in
    $KVARN_LAYERS. Raises Refused where it makes no sense."""
    given = option_of(config, "kvarn_layers") or {}
    try:
        found = by_number(json.loads(given) if isinstance(given, str) else given)
    except ValueError as error:
        raise Refused(
            f"kvarn_layers is {given!r}; it must be a JSON object of layer numbers, or ranges of them, and presets, as "
            f'{{"0": "kvarn_k8v4_g128", "2-5": "kvarn_k4v4_g128"}} ({error})'
        ) from None
    for name in dict.fromkeys(found.values()):
        if name not in PRESETS:
            raise Refused(f"kvarn_layers names the preset {name!r}; allowed are kvarn_k[8432]v[8432]_g128 and _g64")
        if page_tokens(name) != page_tokens(preset):
            raise Refused(f"kvarn_layers names {name}, whose tiles have other lengths than those of {preset}")
    return found


def preset_of(config, layer) -> str:
    """The preset that a packed layer has or, before `settle`, will have."""
    return asked(config, layer.kv_cache_dtype).get(_number(layer), layer.kv_cache_dtype)


def settle(config, preset: str) -> None:
    """Gives the layers of `config`, which exist now, the presets that were asked for."""
    found = asked(config, preset)
    if not found:
        return
    packed = {number: layer for layer in _layers(config, preset) if (number := _number(layer)) is not None}
    if lacking := sorted(found.keys() - packed.keys()):
        raise Refused(f"kvarn_layers names layers {lacking}; packed are {sorted(packed)}")
    for number, name in found.items():
        packed[number].kv_cache_dtype = name
        packed[number].attn_backend = packed[number].impl.repack(name)


def _layers(config, preset: str) -> list:
    layers = config.compilation_config.static_forward_context.values()
    return [layer for layer in layers if getattr(layer, "kv_cache_dtype", None) == preset]


def _number(layer) -> int | None:
    """None for those of a draft model, which have numbers of their own."""
    from vllm.model_executor.models.utils import extract_layer_index  # `kvarn doctor` needs only what may be asked

    name = layer.layer_name
    return None if name.startswith("draft_model") else extract_layer_index(name)
