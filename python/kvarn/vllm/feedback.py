# SPDX-License-Identifier: Apache-2.0
"""Every packed layer's feedback, from what the model that has just been loaded shows on fixed tokens (kvarn.energy).

It lies in buffers of the layer from before vLLM measures memory and captures graphs on, and never changes: vLLM saves
buffers where a sleeping engine throws weights away.
"""

import time

import torch
from vllm.config import get_current_vllm_config
from vllm.distributed import get_pp_group
from vllm.forward_context import set_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.sequence import IntermediateTensors

from kvarn import energy

from . import layers, refuse
from .backend import KvarnLayer

logger = init_logger("vllm.kvarn")


def settle(model: torch.nn.Module, model_config) -> None:
    """Gives the packed layers of `model`, whose weights are loaded, their feedback. Drafting models get none."""
    config = get_current_vllm_config()
    wanted = refuse.feedback_of(config) == "on" and refuse.encoder_of(config) == "weighted"
    if not wanted or model_config is not config.model_config:
        return
    attention = [module for module in model.modules() if isinstance(module, Attention)]
    packed = [layer for layer in attention if isinstance(layer.impl, KvarnLayer)]
    begun = time.perf_counter()
    try:
        found = _seen(model, attention, config)
        for layer in packed:
            bits = layer.impl.layout_in(layers.preset_of(config, layer)).k_bits
            made = found[layer].feedback(bits).to(next(model.parameters()).device)
            layer.register_buffer("kvarn_feedback", made.matrix, persistent=False)
            layer.register_buffer("kvarn_balance", made.balance, persistent=False)
            layer.impl.feedback = made
        logger.info("kvarn: looked at the model's queries, for %.1f s", time.perf_counter() - begun)
    except Exception as error:  # the cache works without, only less precisely
        for layer in packed:
            layer.impl.feedback = None
        logger.warning_once(
            "kvarn: keys are rounded without feedback, this model could not be run ahead of time: %s: %s",
            type(error).__name__,
            error,
        )


def _seen(model, layers: list[Attention], config) -> dict[Attention, energy.Seen]:
    """The model runs on the fixed tokens, as kvarn.energy has it, uncompiled."""
    found: dict[Attention, energy.Seen] = {}

    def in_place_of(layer):
        """The layer's forward: neither its kernels nor the memory that they keep for good are needed."""

        def forward(query, key, value, output_shape=None, output_dtype=None):
            q = query.view(-1, layer.num_heads, layer.head_size)
            shape = output_shape or (len(q), layer.num_heads * layer.head_size_v)
            if key is None:  # it shares an earlier layer's
                return query.new_zeros(shape, dtype=output_dtype)
            k = key.view(-1, layer.num_kv_heads, layer.head_size)
            if isinstance(layer.impl, KvarnLayer):
                found[layer] = energy.Seen.of(q, k)
                return query.new_zeros(shape, dtype=output_dtype)
            v = value.view(-1, layer.num_kv_heads, layer.head_size_v)
            sinks, soft_cap = getattr(layer.impl, "sinks", None), getattr(layer.impl, "logits_soft_cap", None)
            given = energy.attention(q, k, v, layer.impl.scale, layer.sliding_window, sinks, soft_cap)
            return given.reshape(shape).to(output_dtype or query.dtype)

        return forward

    device = next(model.parameters()).device
    tokens = energy.tokens(config.model_config.get_vocab_size()).to(device)
    positions = torch.arange(len(tokens), device=device)
    if config.model_config.uses_mrope:
        positions = positions.expand(3, -1)
    for layer in layers:
        layer.forward = in_place_of(layer)
    try:
        with torch.inference_mode(), set_forward_context(None, config, num_tokens=len(tokens), skip_compiled=True):
            _run(model, tokens, positions)
    finally:
        for layer in layers:
            del layer.forward
    return found


def _run(model, tokens: torch.Tensor, positions: torch.Tensor) -> None:
    """The model, or this pipeline stage of it behind the one before. A stage that fails says so to the next one, which
    would wait for it for good."""
    stages, before, told = get_pp_group(), None, {}
    try:
        if not stages.is_first_rank:
            before = IntermediateTensors(stages.recv_tensor_dict())
            if not before.tensors:
                raise RuntimeError("the pipeline stage before this one could not be run")
        out = model(input_ids=tokens, positions=positions, intermediate_tensors=before, inputs_embeds=None)
        told = {} if stages.is_last_rank else out.tensors
    finally:
        if not stages.is_last_rank:
            stages.send_tensor_dict(told)
