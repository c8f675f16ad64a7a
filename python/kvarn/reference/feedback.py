"""Section 6, feedback: K's codes chosen channel by channel, each with the errors of the channels behind it."""

import numpy as np


def fused(a, b, c):
    """fma(a, b, c) in binary32. The product is exact in binary64; the sum is rounded to odd there, so that rounding it
    again to binary32 is right."""
    product, c = a.astype(np.float64) * b, c.astype(np.float64)
    rounded = product + c
    back = rounded - product
    rest = (product - (rounded - back)) + (c - back)
    bits = np.atleast_1d(rounded).view(np.int64)
    even = np.isfinite(rounded) & (rest != 0) & (bits.reshape(rounded.shape) % 2 == 0)
    away = np.signbit(rest) == np.signbit(rounded)
    odd = (bits.reshape(rounded.shape) + np.where(even, np.where(away, 1, -1), 0)).view(np.float64)
    return odd.astype(np.float32)


def codes(k, s, z, c, qmax, feedback):
    """k [tiles][D][G]; s, z [tiles][D][1]; c [tiles][1][G]; feedback [tiles][D][D] -> codes uint8 [tiles][D][G]."""
    with np.errstate(all="ignore"):
        inverse, y, out = 1 / np.maximum(s, 1e-10), k.copy(), np.empty(k.shape, np.uint8)
        for i in reversed(range(k.shape[1])):
            x = (y[:, i] * (1 / c[:, 0]) - z[:, i]) * inverse[:, i]
            code = np.rint(np.minimum(np.where(x > 0, x, np.float32(0)), qmax))
            delta = (code * s[:, i] + z[:, i]) * c[:, 0] - k[:, i]
            out[:, i] = code
            # Every earlier channel takes this one's error: in each, errors come from the last channel down.
            y[:, :i] = fused(-feedback[:, :i, i, None], delta[:, None], y[:, :i])
    return out
