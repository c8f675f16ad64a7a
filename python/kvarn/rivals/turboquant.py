# SPDX-License-Identifier: Apache-2.0
"""TurboQuant as vLLM has it: keys rotated and rounded to a Gaussian codebook, values to a plain grid.

Source: Zandieh et al. (arXiv 2504.19874); vLLM 0.32, --kv-cache-dtype turboquant_* (vllm#38479), which leaves out
the paper's QJL and keeps the first and last two layers of a dense model in 16 bits: the tables have both, as vLLM
runs it and with all layers packed.
"""

from dataclasses import dataclass
from functools import cache

import torch

from kvarn.rivals.base import Rival
from kvarn.rivals.rounding import min_max, rotate, to_e4m3, to_half


@dataclass(frozen=True)
class TurboQuant(Rival):
    """`k_bits` 8: keys in fp8 e4m3 with scale 1, not rotated; below, a codebook with norm correction (nc)."""

    preset: str
    k_bits: int
    v_bits: int
    raw_layers: int = 0

    @property
    def name(self) -> str:
        return f"turboquant_{self.preset}" + ("" if self.raw_layers else ", all layers")

    def bytes_per_token(self, head_dim: int) -> float:
        keys = head_dim if self.k_bits == 8 else head_dim * self.k_bits // 8 + 2
        slot = keys + head_dim * self.v_bits // 8 + 4
        return slot + slot % 2

    def keys(self, k: torch.Tensor) -> torch.Tensor:
        if self.k_bits == 8:
            return to_e4m3(k)
        head_dim = k.shape[-1]
        norm = k.norm(dim=-1, keepdim=True)
        unit = rotate(k / (norm + 1e-8), head_dim)
        levels = codebook(self.k_bits).to(k.device)
        # The codebook is that of a standard Gaussian; an element of a random unit vector has variance 1 / head_dim.
        picked = levels[torch.bucketize(unit * head_dim**0.5, (levels[1:] + levels[:-1]) / 2, right=True)]
        return rotate(picked / picked.norm(dim=-1, keepdim=True) * to_half(norm), head_dim)

    def values(self, v: torch.Tensor) -> torch.Tensor:
        return min_max(v, self.v_bits)


@cache
def codebook(bits: int) -> torch.Tensor:
    """The 2^bits levels that round a standard Gaussian with the least squared error (Lloyd 1957, Max 1960)."""
    normal = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0)
    count = 2**bits
    levels = normal.icdf((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    infinity = torch.full((1,), torch.inf, dtype=torch.float64)
    for _ in range(3000):
        edges = torch.cat([-infinity, (levels[1:] + levels[:-1]) / 2, infinity])
        density, below = normal.log_prob(edges).exp(), normal.cdf(edges)
        # The centre of mass between two edges a, b of a Gaussian: (pdf(a) - pdf(b)) / (cdf(b) - cdf(a)).
        levels = (density[:-1] - density[1:]) / (below[1:] - below[:-1])
    return levels.float()
