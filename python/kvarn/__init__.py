"""kvarn: the low-bit KV cache for large-language-model serving.

Four verbs over pages that the caller owns, for numpy arrays and torch tensors alike, without copies:

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

The same functions take CUDA tensors, all of them on one device: kvarn.cuda has what a step should do once for all its
layers (CudaWorkspace, plan, pack), torch.ops.kvarn what torch.compile sees. cuda_available() says whether that works
here, cuda_missing() why not.
"""

from __future__ import annotations

from kvarn._core import FORMAT_VERSION, __version__, cuda_missing, cuda_shapes, presets, target, targets
from kvarn._feedback import feedback
from kvarn.layout import Layout
from kvarn.verbs import ENCODERS, append, attend, expand, rotate, workspace_bytes

__all__ = [
    "ENCODERS",
    "FORMAT_VERSION",
    "CudaWorkspace",
    "Layout",
    "Plan",
    "__version__",
    "append",
    "attend",
    "cuda_available",
    "cuda_missing",
    "cuda_shapes",
    "expand",
    "feedback",
    "plan",
    "presets",
    "rotate",
    "target",
    "targets",
    "workspace_bytes",
]


def cuda_available() -> bool:
    """Whether this build has CUDA kernels and there is a device that they run on; cuda_missing() says why not.
    Asks the device, and so starts CUDA in this process."""
    return not cuda_missing()


def __getattr__(name: str):
    # These need torch, or torch and transformers, which numpy users may not have.
    if name in ("cuda", "hf"):
        import importlib

        return importlib.import_module(f"kvarn.{name}")
    if name in ("CudaWorkspace", "Plan", "plan"):
        from kvarn import cuda

        return getattr(cuda, name)
    raise AttributeError(f"module 'kvarn' has no attribute {name!r}")
