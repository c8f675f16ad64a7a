"""Keys divided and queries multiplied by the same powers of two, channel by channel: exact, and no product changes.

Rotation spreads every channel's deviation over all of them, and the tile's steps are as large as that asks for. Where a
few channels of the keys deviate far more than others, balancing them first makes the steps smaller by their arithmetic
mean over their geometric one (docs/encoder-study.md).
"""

from __future__ import annotations


def divided(k, balance):
    """k [tokens, kv_heads, head_dim] by balance [kv_heads, head_dim], in float32, which holds it exactly; None: k."""
    return k if balance is None or k.ndim != 3 else k / _of(balance, k, k.shape[1])


def multiplied(q, balance, kv_heads: int):
    """q [tokens, query_heads, head_dim], each query head by the balance of the KV head that it reads; likewise."""
    if balance is None or q.ndim != 3:
        return q
    its, group = _of(balance, q, kv_heads), q.shape[1] // kv_heads
    return q * (its.repeat_interleave(group, 0) if hasattr(its, "detach") else its.repeat(group, 0))


def _of(balance, x, kv_heads: int):
    if tuple(balance.shape) != (kv_heads, x.shape[2]):
        raise ValueError(f"balance has shape {list(balance.shape)}; it must be [{kv_heads}, {x.shape[2]}], as the keys")
    if "float32" not in str(balance.dtype):
        raise TypeError(f"balance is {balance.dtype}; it must be float32")
    return balance
