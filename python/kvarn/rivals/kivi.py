# SPDX-License-Identifier: Apache-2.0
"""KIVI: keys per channel, values per token, in groups of 32, the most recent tokens in 16 bits.

Source: Liu et al., KIVI (ICML 2024, arXiv 2402.02750), with the paper's group of 32 and residual of 128. Keys are
packed 128 tokens at a time; of the values the last 128 tokens stay raw at any time. The paper attends prompts raw; here
every position reads what a decode step at that position would.
"""

from dataclasses import dataclass

import torch

from kvarn.rivals.base import Recent, Rival
from kvarn.rivals.rounding import min_max

GROUP = 32


@dataclass(frozen=True)
class Kivi(Rival):
    bits: int

    recent = Recent.KIVI
    by_token = False

    @property
    def name(self) -> str:
        return f"KIVI-{self.bits}"

    def bytes_per_token(self, head_dim: int) -> float:
        # A scale and a minimum in 16 bits for every 32 values: one more bit each.
        return 2 * head_dim * (self.bits + 1) / 8

    def keys(self, k: torch.Tensor) -> torch.Tensor:
        whole = len(k) // GROUP * GROUP  # what is left over is read raw by every query that sees it
        groups = k[:whole].movedim(0, -1).unflatten(-1, (-1, GROUP))
        return torch.cat([min_max(groups, self.bits).flatten(-2).movedim(-1, 0), k[whole:]])

    def values(self, v: torch.Tensor) -> torch.Tensor:
        return min_max(v.unflatten(-1, (-1, GROUP)), self.bits).flatten(-2)
