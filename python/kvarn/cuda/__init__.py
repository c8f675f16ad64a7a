# SPDX-License-Identifier: Apache-2.0
"""The verbs on CUDA tensors: workspaces, the plan of a step, and what kvarn.append and its fellows do on a GPU.

Per step, for all layers that have the same layout, query heads and window:

    workspace = kvarn.CudaWorkspace(layout, tokens=8192, requests=256, query_heads=32, max_seq_len=131072)  # once
    plan = kvarn.plan(layout, block_table, seq_lens, query_starts, tokens=len(q), query_heads=32, max_query_len=1,
                      workspace=workspace)
    for layer in layers:
        kvarn.append(layout, pages[layer], block_table, seq_lens, query_starts, k, v, plan=plan)
        kvarn.attend(layout, pages[layer], block_table, seq_lens, query_starts, q, scale=scale, plan=plan, out=out)

With plan(.., defer=True) the tiles that a step completes and does not read are packed for all layers at once, which
takes a fraction of the time: kvarn.cuda.pack(plan, kvarn.cuda.Layers(layout, pages)) then ends the step.

All of it runs on torch's current stream and none of it waits for the device, so that a step can be captured into a CUDA
graph, whose replay with other lengths, tables and rows in the same tensors is right. torch.compile sees operators of
torch's own kind (kvarn.torch_ops). Tables and lengths are on the device, where nothing can be raised: a request that
makes no sense takes no part, and a page index outside the pool is taken for the nearest one inside.
"""

from kvarn.cuda.packing import Layers, pack
from kvarn.cuda.planning import Plan, plan
from kvarn.cuda.verbs import append, attend, expand, prefill_pages, rotate
from kvarn.cuda.workspace import MOST_GROUP, CudaWorkspace

__all__ = [
    "MOST_GROUP",
    "CudaWorkspace",
    "Layers",
    "Plan",
    "append",
    "attend",
    "expand",
    "pack",
    "plan",
    "prefill_pages",
    "rotate",
]
