"""The arithmetic that docs/specification.md fixes to the bit: binary32, every operation rounded by itself.

Arrays are float32 and stay float32: Python scalars are weak under NEP 50 and are rounded to float32 before they act,
which is what the specification asks of its constants.
"""

import numpy as np

F16_MAX = 65504.0
LANES = 32


def f16(x: np.ndarray) -> np.ndarray:
    """Clamps to the finite range of binary16 and rounds to it, nearest even; returned widened to float32."""
    return np.clip(x, -F16_MAX, F16_MAX).astype(np.float16).astype(np.float32)


def total(x: np.ndarray, axis: int) -> np.ndarray:
    """SUM of section 5 along `axis`, which stays with length 1.

    Partial l adds elements l, l + 32, .. starting from the first; then the partials are folded in halves. A partial
    without elements is 0.
    """
    x = np.moveaxis(x, axis, 0)
    partial = np.zeros((LANES, *x.shape[1:]), np.float32)
    partial[: min(LANES, len(x))] = x[:LANES]
    for start in range(LANES, len(x), LANES):
        chunk = x[start : start + LANES]
        partial[: len(chunk)] += chunk
    for half in (16, 8, 4, 2, 1):
        partial = partial[:half] + partial[half : 2 * half]
    return np.moveaxis(partial, 0, axis)


def logarithm(x: np.ndarray) -> np.ndarray:
    """ln of section 7, for x in [1e-3, 1e3]."""
    u, e = np.frexp(x)
    u, e = u * 2, e - 1
    high = u > np.float32(1.41421354)
    u = np.where(high, u * np.float32(0.5), u)
    e = np.where(high, e + 1, e).astype(np.float32)
    f = u - 1
    g = f / (2 + f)
    h = g * g
    series = 1 + h * (0.333333343 + h * (0.2 + h * (0.142857149 + h * 0.111111112)))
    return e * 0.693147182 + 2 * g * series


def exponential(x: np.ndarray) -> np.ndarray:
    """e^x of section 7, for x in [-0.3, 10]."""
    n = np.rint(x * 1.44269502)
    f = (x - n * 0.693359375) - n * -2.12194440e-4
    series = 1.98412701e-4
    for coefficient in (0.00138888892, 0.00833333377, 0.0416666679, 0.166666672, 0.5, 1.0, 1.0):
        series = coefficient + f * series
    return np.ldexp(series, n.astype(np.int32))


def hadamard_blocks(head_dim: int) -> list[int]:
    """The power-of-two blocks that cover head_dim, largest first: 80 -> [64, 16]."""
    return [1 << bit for bit in reversed(range(head_dim.bit_length())) if head_dim >> bit & 1]


def hadamard(x: np.ndarray) -> np.ndarray:
    """The rotation of section 2 along the last axis, in x's own precision (float32 is the normative one)."""
    out, start = np.empty_like(x), 0
    for size in hadamard_blocks(x.shape[-1]):
        block = x[..., start : start + size]
        h = 1
        while h < size:
            pair = block.reshape(*x.shape[:-1], size // (2 * h), 2, h)
            low, high = pair[..., 0, :], pair[..., 1, :]
            block = np.stack((low + high, low - high), axis=-2).reshape(*x.shape[:-1], size)
            h *= 2
        out[..., start : start + size] = block * x.dtype.type(1 / np.sqrt(np.float64(size)))
        start += size
    return out
