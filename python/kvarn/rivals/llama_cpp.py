# SPDX-License-Identifier: Apache-2.0
"""llama.cpp's types for keys and values (--cache-type-k, --cache-type-v): blocks of 32 with a binary16 scale.

Source: ggml's reference rounding of q8_0, q5_0 and q4_0 as documented with its block layouts (34, 22 and 18 bytes for
32 values). Since llama.cpp#21038 a quantized cache is rotated by a Hadamard where 64 divides head_dim: keys by the
largest power of two that divides it, values in blocks of 64; `rotated=False` is LLAMA_ATTN_ROT_DISABLE=1.
"""

from dataclasses import dataclass

import torch

from kvarn.rivals.base import Rival
from kvarn.rivals.rounding import half_away, power_of_two, rotate, to_half

BLOCK = 32
BLOCK_BYTES = {"q8_0": 34, "q5_0": 22, "q4_0": 18}


def round_blocks(x: torch.Tensor, kind: str) -> torch.Tensor:
    """Rounds each 32 elements of the last axis. Codes come from the float32 scale, values from the stored binary16."""
    blocks = x.unflatten(-1, (-1, BLOCK))
    if kind == "q8_0":
        scale = blocks.abs().amax(-1, keepdim=True) / 127
        codes = half_away(blocks * _inverse(scale))
    else:
        # The element of largest magnitude, whatever its sign, gets the one code that has no mirror image.
        lowest = {"q5_0": -16, "q4_0": -8}[kind]
        scale = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)) / lowest
        codes = (blocks * _inverse(scale) - lowest + 0.5).trunc().clamp(0, -2 * lowest - 1) + lowest
    return (codes * to_half(scale)).flatten(-2)


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale == 0, 0.0, 1 / scale)


@dataclass(frozen=True)
class LlamaCpp(Rival):
    k_type: str
    v_type: str
    rotated: bool = True

    @property
    def name(self) -> str:
        types = self.k_type if self.k_type == self.v_type else f"{self.k_type}/{self.v_type}"
        return types if self.rotated else f"{types}, not rotated"

    def bytes_per_token(self, head_dim: int) -> float:
        return head_dim / BLOCK * (BLOCK_BYTES[self.k_type] + BLOCK_BYTES[self.v_type])

    def keys(self, k: torch.Tensor) -> torch.Tensor:
        return self._through(k, self.k_type, power_of_two(k.shape[-1]))

    def values(self, v: torch.Tensor) -> torch.Tensor:
        return self._through(v, self.v_type, 64)

    def _through(self, x: torch.Tensor, kind: str, size: int) -> torch.Tensor:
        if not self.rotated or x.shape[-1] % 64:
            return round_blocks(x, kind)
        return rotate(round_blocks(rotate(x, size), kind), size)
