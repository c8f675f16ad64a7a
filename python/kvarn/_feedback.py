"""kvarn.feedback: from the energy of a layer's queries to what append rounds K with."""

from __future__ import annotations

import numpy as np

DAMPING = 0.1  # of the mean diagonal: a direction that queries seldom have still counts


def feedback(energy):
    """float32 [kv_heads, head_dim, head_dim] for append(.., feedback=..), the same kind of array as energy.

    energy  [kv_heads, head_dim], numpy or torch: the mean square of each channel of the queries that read this KV head,
            after RoPE and before kvarn's rotation; kvarn.energy finds it for a model
    Only ratios within a head matter. Records depend on the result: give a cache the same one for its whole life, and do
    not compute it anew from other queries. The same energy gives the same bits on every machine.

    With the second moment M = H diag(energy) H of rotated queries, damped, and M = R^T R, R upper triangular, it is
    R[i][j] / R[i][i] above the diagonal.
    """
    of_torch = hasattr(energy, "detach")
    squares = np.array(energy.detach().double().cpu().numpy() if of_torch else energy, np.float64)
    if squares.ndim != 2:
        raise ValueError(f"energy has shape {list(squares.shape)}; it must be [kv_heads, head_dim]")
    most = squares.max(-1, initial=0, keepdims=True)
    if not np.isfinite(squares).all() or (squares < 0).any() or (most <= 0).any():
        raise ValueError("energy holds mean squares: they must be finite, not negative, and not all zero in any head")
    ratios = _ratios(squares / most)
    if not of_torch:
        return ratios
    import torch

    return torch.from_numpy(ratios).to(energy.device)


def _ratios(energy):
    from kvarn.reference.arithmetic import hadamard

    heads, channels = energy.shape
    diagonal = np.zeros((heads, channels, channels))
    diagonal[:, range(channels), range(channels)] = energy
    moment = hadamard(hadamard(diagonal).swapaxes(1, 2)).copy()
    mean = sum(moment[:, i, i] for i in range(channels)) / channels
    moment[:, range(channels), range(channels)] += DAMPING * mean[:, None]
    out = np.zeros(moment.shape, np.float32)
    for i in range(channels):  # Cholesky without its square roots, one fixed order of operations
        row, rest = moment[:, i, i + 1 :], moment[:, i + 1 :, i + 1 :]
        ratio = row / moment[:, i, i, None]
        out[:, i, i + 1 :] = ratio
        rest -= ratio[:, :, None] * row[:, None, :]
    return out
