# SPDX-License-Identifier: Apache-2.0
"""Tests of the CUDA verbs: skipped where there is no GPU, or no kernels for one. run.sh builds and runs them."""

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
sys.path.insert(0, str(Path(__file__).parents[1] / "python"))


def pytest_collection_modifyitems(items):
    reason = _missing()
    for item in items:
        if Path(item.fspath).parent == Path(__file__).parent:
            item.add_marker(pytest.mark.gpu)
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


def _missing() -> str:
    import kvarn
    import torch

    if not torch.cuda.is_available():
        return "torch finds no GPU"
    return kvarn.cuda_missing()
