# SPDX-License-Identifier: Apache-2.0
"""What `kvarn bench serve` hears from the vLLM that is installed, in a process of its own."""

import json
import subprocess
import sys

import pytest
from engine import ON_GPU, PRESET

DRAFTED = pytest.param(f"{PRESET}+ngram:2", marks=pytest.mark.slow)


@pytest.mark.parametrize("dtype", ["auto", PRESET, DRAFTED])
def test_an_engine_and_three_mixes(small_model, dtype):
    options = {"max_model_len": 512, "kv_cache_memory_bytes": 1 << 26, "enforce_eager": True, "compilation_config": {}}
    if ON_GPU:
        options["gpu_memory_utilization"] = 0.05  # others are there
    mixes = [[2, 40, 2, None, None], [3, 40, 2, 20, None], [2, 300, 2, None, 40]]
    asked = {"model": str(small_model), "kv_cache_dtype": dtype, "mixes": mixes, "options": options}
    ran = subprocess.run(
        [sys.executable, "-m", "kvarn.bench.engine", json.dumps(asked)], capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    start, *mixes = map(json.loads, ran.stdout.splitlines())
    assert start["fit_tokens"] > 512 and len(mixes) == 3
    assert mixes[2]["hit_tokens"] >= 256 and "hit_tokens" not in mixes[0]
    for mix in mixes:
        assert mix["step_ms"] > 0 and mix["step_mean_ms"] > 0
        assert mix["step_tokens"] >= 1
