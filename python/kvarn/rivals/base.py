# SPDX-License-Identifier: Apache-2.0
"""What a simulated format is."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from enum import Enum

import torch


class Recent(Enum):
    """Which tokens, up to its own, the query at position t reads in 16 bits, whatever the format does to the others."""

    NONE = "none"
    TILE = "tile"  # its own tile of 128: from t - t % 128, as kvarn does
    KIVI = "kivi"  # keys as TILE, values from t - 128


class Rival(ABC):
    """A format of keys and values. Subclasses are frozen dataclasses: their repr says all that a result depends on.

    recent      tokens that the format itself keeps in 16 bits; not counted in its bits per value, as kvarn's are not
    raw_layers  so many layers at the start and as many at the end stay in 16 bits, and those are counted
    by_token    what a token rounds to does not depend on other tokens
    """

    recent: Recent = Recent.NONE
    raw_layers: int = 0
    by_token: bool = True

    @property
    @abstractmethod
    def name(self) -> str:
        """The name in tables: that of the project which has the format."""

    @abstractmethod
    def bytes_per_token(self, head_dim: int) -> float:
        """Bytes of one token of one KV head, key and value with all scales, in a packed layer."""

    @abstractmethod
    def keys(self, k: torch.Tensor) -> torch.Tensor:
        """float32 [tokens, kv_heads, head_dim] -> the same after packing and unpacking."""

    @abstractmethod
    def values(self, v: torch.Tensor) -> torch.Tensor:
        """As `keys`, for values."""

    def bits_per_value(self, head_dim: int) -> float:
        """Bits per element of K and V in a packed layer."""
        return 8 * self.bytes_per_token(head_dim) / (2 * head_dim)

    def mean_bits(self, head_dim: int, full: Sequence[int], layers: int) -> float:
        """The mean over the layers that attend to everything, numbers `full` of `layers`: 16 bits where raw."""
        packed = sum(self.packs(layer, layers) for layer in full)
        return (packed * self.bits_per_value(head_dim) + (len(full) - packed) * 16) / len(full)

    def packs(self, layer: int, layers: int) -> bool:
        """Whether layer number `layer` of `layers` is packed."""
        return self.raw_layers <= layer < layers - self.raw_layers
