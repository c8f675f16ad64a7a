# SPDX-License-Identifier: Apache-2.0
"""The CPU library beside the GPU's kernels in a running engine.

Every layer of every step also has the CPU library append and attend: on the same keys, values and queries, through the
same block table, into pages of its own. Everything else in the step is vLLM's, once.
"""

from contextlib import contextmanager

import kvarn
import pytest
import torch
from kvarn.vllm import backend

HALF_ULP = 2.0**-8  # of bfloat16, at most, relative: rounded, it is a whole one


class Beside:
    """What was seen.

    rows     that were compared, layers counted
    wrong    pages, in all layers and steps, whose bytes were not the CPU library's
    worst    relative L2 distance of one row's attention, over all heads, from the CPU library's
    """

    def __init__(self, answer: str):
        self.answer = answer
        self.rows = self.wrong = 0
        self.worst = 0.0
        self.pages: dict[str, torch.Tensor] = {}  # the GPU's, by layer
        self._own: dict[str, torch.Tensor] = {}
        self._random = torch.Generator().manual_seed(7)

    @torch.inference_mode()  # the pages were made in it
    def begin(self) -> None:
        """Counts from now on. Requests of an engine's warm-up share the null block for their pages ahead and write over
        each other there, in whichever order: model runner 2's leave other bytes than the CPU library's."""
        self.rows = self.wrong = 0
        self.worst = 0.0
        for name, pages in self.pages.items():
            self._own[name].copy_(pages)

    def step(self, name: str, impl, gpu_forward, query, key, value, pages, batch, output) -> None:
        """`gpu_forward` computes the step; then the CPU library does."""
        if name not in self._own:
            self.pages[name], self._own[name] = pages, torch.empty(pages.shape, dtype=pages.dtype).copy_(pages)
        own = self._own[name]
        gpu_forward()
        n = int(batch[2][-1])
        matrix, balance = (None, None) if impl.feedback is None else impl.feedback.to("cpu")
        kvarn.append(
            impl.layout, own, *batch, key[:n].cpu(), value[:n].cpu(), encoder=impl.encoder, feedback=matrix,
            balance=balance,
        )  # fmt: skip
        theirs = kvarn.attend(
            impl.layout, own, *batch, query[:n].cpu(), scale=impl.scale, soft_cap=impl.soft_cap, balance=balance
        ).flatten(1)  # fmt: skip
        ours = output[:n].cpu().flatten(1)
        self.rows += n
        self.wrong += int((pages.cpu() != own).any(1).sum())
        distance = (ours.float() - theirs.float()).norm(dim=1) / theirs.float().norm(dim=1)
        self.worst = max(self.worst, float(distance.max()))
        if self.answer != "gpu":
            output[:n] = self._told(theirs).view_as(output[:n])

    def _told(self, theirs: torch.Tensor) -> torch.Tensor:
        if self.answer == "rounded":
            up = torch.randint(0, 2, theirs.shape, generator=self._random) * 2 - 1
            return (theirs.float() * (1 + up * HALF_ULP)).to(theirs.dtype)
        return theirs


@contextmanager
def beside(answer: str):
    """Engines made inside compute every step twice, and go on with the attention that `answer` names: "gpu", "cpu", or
    "rounded", the CPU library's with every element moved by a unit in the last place of bfloat16, up or down at random.
    """
    seen, kernels = Beside(answer), backend._kernels()
    build, forward = kernels.Builder.build, kernels.Impl.forward

    def build_both(self, common_prefix_len, common_attn_metadata, fast_build=False):
        batch, n = common_attn_metadata, common_attn_metadata.num_reqs
        made = build(self, common_prefix_len, batch, fast_build)
        starts = batch.query_start_loc[: n + 1]
        slots = batch.slot_mapping[starts[:-1].clamp(max=len(batch.slot_mapping) - 1)]
        lengths = batch.seq_lens[:n].masked_fill(slots < 0, 0)  # dummy steps write nothing
        made.beside = tuple(x.cpu() for x in (batch.block_table_tensor[:n], lengths, starts))
        return made

    def forward_both(self, layer, query, key, value, kv_cache, attn_metadata, output, **others):
        def inner():
            forward(self, layer, query, key, value, kv_cache, attn_metadata, output, **others)

        if attn_metadata is None or not attn_metadata.beside[1].any():
            inner()
        else:
            pages, batch = self.pages_of(kv_cache), attn_metadata.beside
            seen.step(layer.layer_name, self, inner, query, key, value, pages, batch, output)
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels.Builder, "build", build_both)
        patch.setattr(kernels.Impl, "forward", forward_both)
        yield seen
