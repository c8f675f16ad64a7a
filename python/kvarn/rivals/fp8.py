# SPDX-License-Identifier: Apache-2.0
"""fp8 e4m3 with one scale for each of K and V of a layer, or one per token and head.

Source: vLLM 0.32, --kv-cache-dtype fp8 and fp8_per_token_head (v1/attention/ops/triton_reshape_and_cache_flash.py). The
scale of a layer is 1 unless the checkpoint brings one.
"""

from dataclasses import dataclass

import torch

from kvarn.rivals.base import Rival
from kvarn.rivals.rounding import E4M3_MAX, to_e4m3


@dataclass(frozen=True)
class Fp8(Rival):
    """Scale 1, vLLM's default."""

    name = "fp8"

    def bytes_per_token(self, head_dim: int) -> float:
        return 2 * head_dim

    def keys(self, k: torch.Tensor) -> torch.Tensor:
        return to_e4m3(k)

    values = keys


@dataclass(frozen=True)
class Fp8Calibrated(Fp8):
    """The largest magnitude of the layer, in this very context, becomes 448: the best that calibration can do."""

    name = "fp8, calibrated"
    by_token = False

    def keys(self, k: torch.Tensor) -> torch.Tensor:
        scale = k.abs().max().clamp_min(1e-12) / E4M3_MAX
        return to_e4m3(k / scale) * scale

    values = keys


@dataclass(frozen=True)
class Fp8PerTokenHead(Rival):
    """The largest magnitude of each token and head becomes 448; scales in float32."""

    name = "fp8_per_token_head"

    def bytes_per_token(self, head_dim: int) -> float:
        return 2 * (head_dim + 4)

    def keys(self, k: torch.Tensor) -> torch.Tensor:
        scale = (k.abs().amax(-1, keepdim=True) / E4M3_MAX).clamp_min(1e-6)
        return to_e4m3(k / scale) * scale

    values = keys
