"""Sections 6 and 7 of docs/specification.md: a tile's codes, scales and zeros.

A matrix is [tiles][rows][columns] float32 (K: channels x tokens, V: tokens x channels); a value per row is
[tiles][R][1], a value per column [tiles][1][C]. Every function works on any number of tiles at once.
"""

from dataclasses import dataclass

import numpy as np

from . import feedback as feeding
from .arithmetic import exponential, f16, logarithm, total

TINY = np.float32(2.0**-40)
# f of start: from which part of a row's range FIT starts, for each width.
KEYS_START = {2: 0.65, 3: 1.0, 4: 1.0, 8: 1.0}
VALUES_START = {2: 0.65, 3: 0.75, 4: 0.9, 8: 1.0}


@dataclass
class Grid:
    """value = (code * scale + zero) * column; codes [tiles][R][C], scale, zero [tiles][R][1], column [tiles][1][C]."""

    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    column: np.ndarray


def encode(k: np.ndarray, v: np.ndarray, k_bits: int, v_bits: int, encoder: str, feedback=None) -> tuple[Grid, Grid]:
    """k, v [tiles][G][D] float32 with binary16 values -> grids of K ([D][G]) and of V ([G][D]).
    feedback: None, or float32 [tiles][D][D] (`weighted` only)."""
    with np.errstate(all="ignore"):
        if encoder == "varnorm" and feedback is not None:
            raise ValueError("the encoder varnorm takes no feedback; use weighted")
        if encoder == "varnorm":
            return varnorm(k.swapaxes(1, 2), k_bits), varnorm(v, v_bits)
        if encoder == "weighted":
            return weighted(k, v, k_bits, v_bits, feedback)
    raise ValueError(f"unknown encoder {encoder!r}: weighted or varnorm")


def weighted(k, v, k_bits, v_bits, feedback=None):
    rk, rv = _rarity(k), _rarity(v)
    wk = np.minimum(np.maximum(rv * rk, 1), 4096).swapaxes(1, 2)
    wv = np.minimum(rv * rv * rv, 131072)
    m = k.swapaxes(1, 2)
    k_grid = _fit(m, _token_norm(k), k_bits, KEYS_START[k_bits], lambda c: wk, np.ones_like(m[:, :, :1]), debias=False)
    v_grid = _fit(v, np.ones_like(v[:, :1]), v_bits, VALUES_START[v_bits], lambda c: c * c, wv, debias=True)
    if feedback is not None:
        k_grid.codes = feeding.codes(m, k_grid.scale, k_grid.zero, k_grid.column, 2**k_bits - 1, feedback)
    return k_grid, v_grid


def _rarity(x):
    """rk or rv, [tiles][G][1]: the mean squared norm of the tile's tokens over the token's own."""
    squared = total(x * x, -1)
    return (total(squared, 1) / x.shape[1]) / np.maximum(squared, TINY)


def _token_norm(k):
    """c of the token norm, [tiles][1][G]: the norms over the power of two nearest their geometric mean."""
    norm = np.sqrt(total(k * k, -1) / k.shape[-1])
    exponent = np.where(norm == 0, -24, np.maximum(np.frexp(norm)[1] - 1, -24)).astype(np.int64)
    tokens = norm.shape[1]
    middle = (2 * exponent.sum(1, keepdims=True) + tokens) // (2 * tokens)
    scaled = norm * np.ldexp(np.float32(1), -middle.astype(np.int32))
    return f16(np.minimum(np.maximum(scaled, np.float32(2.0**-8)), np.float32(2.0**8))).swapaxes(1, 2)


def _codes(x, s, z, qmax):
    inverse = 1 / np.maximum(s, 1e-10)
    return np.rint(np.minimum(np.maximum((x - z) * inverse, 0), qmax))


def _solve(x, s, z, W, qmax):
    """Weighted least squares of (s, z) for the codes of the present grid, where that is well posed."""
    q = _codes(x, s, z, qmax)
    Wq = W * q
    Sw, Sq, Sqq = total(W, -1), total(Wq, -1), total(Wq * q, -1)
    Sx, Sqx = total(W * x, -1), total(Wq * x, -1)
    det = Sw * Sqq - Sq * Sq
    s_new = (Sw * Sqx - Sq * Sx) / det
    z_new = (Sx - s_new * Sq) / Sw
    take = (det > np.float32(1e-12) * Sw * Sqq) & (s_new > 0)
    return np.where(take, s_new, s), np.where(take, z_new, z)


def _error(x, s, z, W, qmax):
    r = _codes(x, s, z, qmax) * s + z - x
    return total(W * r * r, -1)


def _fit(m, c, bits, start, weight, U, debias):
    """FIT: alternating weighted least squares of rows and columns. weight(c) gives W; U weighs rows for the columns."""
    qmax = 2**bits - 1
    x, W = m * (1 / c), weight(c)

    lo, hi = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    f, w = np.float32(start), hi - lo
    s, z = f * w / qmax, (lo + hi) * np.float32(0.5) - f * w * np.float32(0.5)
    solved = _solve(x, s, z, W, qmax)
    better = _error(x, *solved, W, qmax) < _error(x, s, z, W, qmax)
    s, z = np.where(better, solved[0], s), np.where(better, solved[1], z)

    for _ in range(2):
        y = _codes(x, s, z, qmax) * s + z
        refit = total(U * m * y, -2) / total(U * y * y, -2)
        c = np.where((np.float32(0.25) * c < refit) & (refit < 4 * c), f16(refit), c)
        x, W = m * (1 / c), weight(c)
        for _ in range(2):
            s, z = _solve(x, s, z, W, qmax)

    s, z = f16(s), f16(z)
    q = _codes(x, s, z, qmax)
    if debias:
        y, Sw = q * s + z, total(W, -1)
        mx, my = total(W * x, -1) / Sw, total(W * y, -1) / Sw
        A, B = total(W * (x - mx) * (x - mx), -1), total(W * (x - mx) * (y - my), -1)
        g = np.where(B > 0, np.minimum(np.maximum(A / B, np.float32(0.8)), np.float32(1.5)), np.float32(1))
        s, z = f16(s * g), f16(mx - (my - z) * g)
    return Grid(q.astype(np.uint8), s, z, c)


def _deviation(x, axis):
    n = x.shape[axis]
    centred = x - total(x, axis) / n
    return np.sqrt(total(centred * centred, axis) / (n - 1))


def _imbalance(x):
    def ratio(std):
        return std.max((1, 2), keepdims=True) / np.maximum(std.min((1, 2), keepdims=True), np.float32(1e-8))

    return ratio(_deviation(x, -2)) + ratio(_deviation(x, -1))


def varnorm(m, bits):
    """The published algorithm: log-space variance normalization of columns and rows, then minimum and maximum."""
    qmax = 2**bits - 1
    a, r = np.zeros_like(m[:, :1]), np.zeros_like(m[:, :, :1])
    x, best, sc, sr = m, _imbalance(m), np.ones_like(a), np.ones_like(r)

    def moved(log_scale, std):
        step = logarithm(np.clip(std, np.float32(1e-3), np.float32(1e3)))
        return np.clip(log_scale + step, np.float32(-0.3), np.float32(10))

    for _ in range(8):
        a = moved(a, _deviation(x, -2))
        x = m / exponential(a) / exponential(r)
        r = moved(r, _deviation(x, -1))
        x = m / exponential(a) / exponential(r)
        now = _imbalance(x)
        keep = now <= best
        best = np.where(keep, now, best)
        sc, sr = np.where(keep, exponential(a), sc), np.where(keep, exponential(r), sr)

    x = m / sc / sr
    lo, hi = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    s = np.maximum((hi - lo) / qmax, np.float32(1e-10))
    codes = np.rint(np.clip((x - lo) / s, 0, qmax)).astype(np.uint8)
    return Grid(codes, f16(sr * s), f16(sr * lo), f16(sc))
