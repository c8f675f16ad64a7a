# SPDX-License-Identifier: Apache-2.0
"""Runs vLLM's own linear layers one row at a time.

On a CPU their results depend on how many rows come together, so that a prompt alone and the same prompt in a batch
differ without any fault of the cache. One row at a time they do not, and everything else that vLLM computes for a row
does not depend on its neighbours either: then two runs must agree to the bit, or the cache is wrong.
"""

import torch
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod


def apply(monkeypatch) -> None:
    """Until `monkeypatch` is undone."""
    for method in (UnquantizedLinearMethod, UnquantizedEmbeddingMethod):
        monkeypatch.setattr(method, "apply", _one_row_at_a_time(method.apply))


def _one_row_at_a_time(inner):
    def apply(self, layer, x, bias=None):
        if x.dim() != 2 or x.shape[0] < 2:
            return inner(self, layer, x, bias)
        return torch.cat([inner(self, layer, row, bias) for row in x.split(1)])

    return apply
