"""kvarn: the low-bit KV cache for large-language-model serving.

Four verbs over pages that the caller owns, for numpy arrays and torch CPU tensors alike (DLPack, no copies):

    layout = kvarn.Layout("kvarn_k4v2_g128", head_dim=128, kv_heads=8)
    pages = np.zeros((num_pages, layout.page_bytes), np.uint8)
    kvarn.append(layout, pages, block_table, seq_lens, query_starts, k, v)
    out = kvarn.attend(layout, pages, block_table, seq_lens, query_starts, q, scale=128**-0.5)

Shapes of a step: block_table int32 [requests, width], seq_lens int32 [requests] (this step's tokens included),
query_starts int32 [requests + 1], k and v [tokens, kv_heads, head_dim], q and out [tokens, query_heads, head_dim], in
float32, float16 or bfloat16; last axes contiguous. A request with seq_len 0 takes no part. A request of L tokens needs
ceil(L / page_tokens) + pages_ahead entries of its row. ValueError, TypeError and IndexError say what was given and what
is allowed; nothing is written before every argument is checked. Threads are OpenMP's (torch.set_num_threads,
OMP_NUM_THREADS).
"""

from __future__ import annotations

from kvarn._core import FORMAT_VERSION, __version__, presets, target, targets
from kvarn.layout import Layout
from kvarn.verbs import append, attend, expand, rotate, workspace_bytes

__all__ = [
    "FORMAT_VERSION",
    "Layout",
    "__version__",
    "append",
    "attend",
    "expand",
    "presets",
    "rotate",
    "target",
    "targets",
    "workspace_bytes",
]
