# SPDX-License-Identifier: Apache-2.0
"""NVFP4: e2m1 values, an e4m3 scale for every 16 of them, and a factor per layer that is 1 without calibration.

Source: NVIDIA's description of NVFP4 KV cache (blog, 2025-12-08) and vLLM's --kv-cache-dtype nvfp4 (vllm#40177).
"""

from dataclasses import dataclass

import torch

from kvarn.rivals.base import Rival
from kvarn.rivals.rounding import to_e4m3

BLOCK = 16
# The magnitudes of e2m1: one mantissa bit.
LEVELS = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


@dataclass(frozen=True)
class Nvfp4(Rival):
    name = "nvfp4"

    def bytes_per_token(self, head_dim: int) -> float:
        return 2 * (head_dim / 2 + head_dim / BLOCK)

    def keys(self, k: torch.Tensor) -> torch.Tensor:
        blocks = k.unflatten(-1, (-1, BLOCK))
        scale = to_e4m3(blocks.abs().amax(-1, keepdim=True) / LEVELS[-1].item())
        return (to_e2m1(torch.where(scale == 0, 0.0, blocks / scale)) * scale).flatten(-2)

    values = keys


def to_e2m1(x: torch.Tensor) -> torch.Tensor:
    """To the nearest level, saturating at 6; a tie goes to the level with an even mantissa."""
    levels = LEVELS.to(x.device)
    middles = (levels[1:] + levels[:-1]) / 2
    magnitude = x.abs()
    # Counting the middles below: `right` takes a tie up, `left` down; the even one has an even index.
    down, up = torch.bucketize(magnitude, middles), torch.bucketize(magnitude, middles, right=True)
    return torch.copysign(levels[torch.where(down % 2 == 0, down, up)], x)
