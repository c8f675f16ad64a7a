# SPDX-License-Identifier: Apache-2.0
"""Integers with one float32 scale per token and head.

Source: vLLM 0.32, --kv-cache-dtype int8_per_token_head and int4_per_token_head (v1/attention/ops/
triton_reshape_and_cache_flash.py and int4_per_token_head.py; vllm#38378, #40835).
"""

from dataclasses import dataclass
from functools import cache

import torch

from kvarn.rivals.base import Rival
from kvarn.rivals.rounding import half_away, power_of_two, rotate


@dataclass(frozen=True)
class Int8PerTokenHead(Rival):
    """Symmetric, -127 .. 127, no rotation."""

    name = "int8_per_token_head"

    def bytes_per_token(self, head_dim: int) -> float:
        return 2 * (head_dim + 4)

    def keys(self, k: torch.Tensor) -> torch.Tensor:
        scale = (k.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-6)
        return half_away(k / scale).clamp(-128, 127) * scale

    values = keys


@dataclass(frozen=True)
class Int4PerTokenHead(Rival):
    """Random signs, Hadamard, then 16 levels with an integer zero point of 4 bits, kept in the scale's lowest bits.

    The zero point cannot leave 0 .. 15, so the levels always span zero; a rotated vector's do so anyway.
    """

    name = "int4_per_token_head"

    def bytes_per_token(self, head_dim: int) -> float:
        return 2 * (head_dim / 2 + 4)

    def keys(self, k: torch.Tensor) -> torch.Tensor:
        size = power_of_two(k.shape[-1])
        signs = _signs(size).repeat(k.shape[-1] // size).to(k.device)
        return rotate(self.round(rotate(k * signs, size)), size) * signs

    values = keys

    @staticmethod
    def round(x: torch.Tensor) -> torch.Tensor:
        """Rounds rotated vectors, each with its own scale and zero point."""
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        scale = ((high - low) / 15).clamp_min(1e-6)
        zero = half_away(-low / scale).clamp(0, 15)
        codes = half_away(x / scale + zero).clamp(0, 15)
        stored = (scale.view(torch.int32) & -16 | zero.to(torch.int32)).view(torch.float32)
        return (codes - zero) * stored


@cache
def _signs(size: int) -> torch.Tensor:
    drawn = torch.Generator().manual_seed(0x9E3779B9)
    return 2.0 * torch.bernoulli(torch.full((size,), 0.5), generator=drawn) - 1.0
