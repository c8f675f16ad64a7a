# SPDX-License-Identifier: Apache-2.0
"""What several formats share: rotations and rounding to a grid. Groups are the last axis."""

from functools import cache

import torch

E4M3_MAX = 448.0


@cache
def hadamard(size: int) -> torch.Tensor:
    """The orthonormal Sylvester-Hadamard matrix of a power of two: its own inverse."""
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    if matrix.shape[0] != size:
        raise ValueError(f"{size} is no power of two; a Hadamard rotation needs one")
    return matrix / size**0.5


def rotate(x: torch.Tensor, size: int) -> torch.Tensor:
    """Every `size` elements of the last axis by the Hadamard matrix; a second call undoes the first."""
    return (x.unflatten(-1, (-1, size)) @ hadamard(size).to(x.device)).flatten(-2)


def power_of_two(n: int) -> int:
    """The largest power of two that divides n."""
    return n & -n


def half_away(x: torch.Tensor) -> torch.Tensor:
    """To the nearest integer, halves away from zero (C's roundf; torch.round takes halves to even)."""
    return torch.trunc(x + 0.5 * x.sign())


def to_half(x: torch.Tensor) -> torch.Tensor:
    """Rounded to binary16."""
    return x.to(torch.float16).to(x.dtype)


def to_e4m3(x: torch.Tensor) -> torch.Tensor:
    """Rounded to fp8 e4m3, saturating at 448."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).to(x.dtype)


def min_max(x: torch.Tensor, bits: int, tiny: float = 1e-8) -> torch.Tensor:
    """Asymmetric rounding of each group to 2^bits levels from its minimum to its maximum, both stored as binary16.

    Codes come from the unrounded scale and minimum, as TurboQuant's values and KIVI have it.
    """
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    most = 2**bits - 1
    step = ((high - low) / most).clamp_min(tiny)
    return torch.floor((x - low) / step + 0.5).clamp(0, most) * to_half(step) + to_half(low)
