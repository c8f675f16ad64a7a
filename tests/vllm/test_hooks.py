# SPDX-License-Identifier: Apache-2.0
"""In which process of vLLM's each hook has to be in place."""

from types import SimpleNamespace

import pytest
import torch
from engine import PRESET
from kvarn.vllm import compat, hooks
from vllm.v1.attention.selector import AttentionSelectorConfig

CONFIG = SimpleNamespace(cache_config=SimpleNamespace(cache_dtype=PRESET), kv_transfer_config=None)
LAYER = AttentionSelectorConfig(head_size=64, dtype=torch.bfloat16, kv_cache_dtype=PRESET, block_size=128)


@pytest.mark.parametrize("asked", [
    pytest.param(lambda: hooks.register_specs(CONFIG), id="scheduler"),
    pytest.param(lambda: hooks.backend_path(LAYER), id="worker"),
])  # fmt: skip
def test_scheduler_and_workers_agree(monkeypatch, asked):
    """Under tensor parallelism a worker that did not know would leave blocks of windowed layers as they were."""
    done = []
    for name in ("widen_mixed_rows", "zero_windows"):
        monkeypatch.setattr(compat, name, lambda name=name: done.append(name))
    asked()
    assert done == ["widen_mixed_rows", "zero_windows"]
