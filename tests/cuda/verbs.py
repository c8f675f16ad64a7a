# SPDX-License-Identifier: Apache-2.0
"""The CUDA verbs on numpy arrays, so that the CPU's scenarios (golden records, the toy server) run on the GPU."""

import kvarn
import numpy as np
import torch
from gpu import DEVICE


def up(x):
    return x.to(DEVICE) if isinstance(x, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(x)).to(DEVICE)


class CudaVerbs:
    """append, attend, expand with the signatures of kvarn on numpy arrays, in a workspace of its own."""

    Layout = kvarn.Layout

    def __init__(self, tokens=1200, requests=8, max_seq_len=2048, ctas=0):
        self.limits, self.spaces = (tokens, requests, max_seq_len, ctas), {}

    def space(self, layout):
        if layout not in self.spaces:
            tokens, requests, longest, ctas = self.limits
            self.spaces[layout] = kvarn.CudaWorkspace(
                layout, tokens, requests, 16 * layout.kv_heads, longest, DEVICE, ctas
            )
        return self.spaces[layout]

    def append(
        self, layout, pages, block_table, seq_lens, query_starts, k, v, encoder="weighted", feedback=None, balance=None
    ):
        on_device = up(pages)
        replaced = torch.zeros(1, dtype=torch.int64, device=DEVICE)
        plan = kvarn.plan(
            layout, up(block_table), up(seq_lens), up(query_starts), tokens=len(k), workspace=self.space(layout)
        )
        given = {"feedback": feedback, "balance": balance}
        kvarn.append(
            layout, on_device, None, None, None, up(k), up(v), encoder=encoder, plan=plan, replaced=replaced,
            **{name: None if x is None else up(x) for name, x in given.items()},
        )  # fmt: skip
        pages[:] = on_device.cpu().numpy()
        return int(replaced)

    def attend(self, layout, pages, block_table, seq_lens, query_starts, q, *, scale, soft_cap=0.0):
        rows = up(q)
        plan = kvarn.plan(
            layout, up(block_table), up(seq_lens), up(query_starts), tokens=len(q), query_heads=rows.shape[1],
            max_query_len=max(1, int(np.diff(query_starts).max(initial=1))), workspace=self.space(layout),
        )  # fmt: skip
        out = torch.full_like(rows, float("nan"))
        kvarn.attend(layout, up(pages), None, None, None, rows, scale=scale, soft_cap=soft_cap, out=out, plan=plan)
        return out.cpu().numpy()

    def expand(self, layout, pages, block_table, seq_lens):
        return tuple(x.cpu().numpy() for x in kvarn.expand(layout, up(pages), up(block_table), up(seq_lens)))
