# SPDX-License-Identifier: Apache-2.0
"""Presets, encoders and models other than the usual one, end to end."""

import math

import pytest
from engine import ON_GPU, PRESET, Engine, first_difference

pytestmark = pytest.mark.usefixtures("row_by_row")


@pytest.fixture
def some(prompts):
    """Three of the prompts, two of which share a prefix."""
    return prompts[3:7:3] + prompts[7:]


@pytest.mark.parametrize("option", ["configuration", "environment"])
def test_encoder(small_model, prompts, base, monkeypatch, option):
    if option == "environment":
        monkeypatch.setenv("KVARN_ENCODER", "varnorm")
    chosen = {"additional_config": {"kvarn_encoder": "varnorm"}} if option == "configuration" else {}
    with Engine(small_model, **chosen) as engine:
        ours = engine.run(prompts[3:5], tokens=8)
    weighted = [type(a)(a.tokens[:8], a.logprobs[:8]) for a in base[3:5]]
    assert first_difference(ours, weighted) is not None


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["kvarn_k8v4_g128", "kvarn_k4v4_g64", "kvarn_k2v2_g128", "kvarn_k3v8_g64"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_preset(small_model, some, preset, dtype):
    options = {"kv_cache_dtype": preset, "dtype": dtype}
    with Engine(small_model, **options) as engine:
        whole = engine.run(some)
    with Engine(small_model, **options, enable_prefix_caching=True, max_num_batched_tokens=100) as engine:
        chunked, cached = engine.run(some), engine.run(some)
        assert engine.counters()["hits"] > 0
    assert first_difference(chunked, whole) is None
    assert first_difference(cached, whole) is None


@pytest.mark.slow
@pytest.mark.parametrize("skipped", ["0", "3"])
def test_a_layer_in_16_bits(small_model, prompts, skipped):
    """It shares block ids with packed layers, whichever comes first."""
    options = {"kv_cache_dtype_skip_layers": [skipped], "enable_prefix_caching": True}
    with Engine(small_model, **options) as engine:
        plain = engine.run(prompts)
    with Engine(small_model, **options, num_gpu_blocks_override=20) as engine:
        tight = engine.run(prompts)
        assert engine.counters()["preemptions"] > 0
    # vLLM's own attention depends on the schedule in its last bits; on a GPU that changes a token sooner or later.
    alike = 10 if ON_GPU else 70
    same = sum(a.tokens[:alike] == b.tokens[:alike] for a, b in zip(tight, plain, strict=True))
    assert same >= (6 if ON_GPU else 8)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 200}], ids=str)
def test_sliding_windows_stay_in_16_bits(small_model, prompts, options):
    some = prompts[3:6]
    windows = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    model = {"hf_overrides": {"layer_types": windows, "sliding_window": 256}}
    with Engine(small_model, **model, kv_cache_dtype="auto") as engine:
        plain = engine.run(some, tokens=1)
    with Engine(small_model, **model, **options, enable_prefix_caching=True) as engine:
        cold, warm = engine.run(some, tokens=1), engine.run(some, tokens=1)
        assert engine.counters()["hits"] > 0
        specs = [group.kv_cache_spec for group in engine.groups()]
        kinds = {(type(spec).__name__, spec.block_size) for spec in specs}
        assert kinds == {("KvarnSpec", 640 if ON_GPU else 128), ("WindowSpec", 128 if ON_GPU else 32)}
    for ours in (cold, warm):
        for answer, expected in zip(ours, plain, strict=True):
            assert answer.tokens == expected.tokens
            assert math.isclose(answer.logprobs[0], expected.logprobs[0], abs_tol=0.5)


def test_a_model_of_windows_only(small_model):
    model = {"hf_overrides": {"layer_types": ["sliding_attention"] * 6, "sliding_window": 256}}
    with pytest.raises(ValueError, match="nothing to pack"):
        Engine(small_model, **model).__enter__()


def test_stock_vllm_is_untouched(small_model, prompts):
    """With the plugin installed, `auto` gets vLLM's own backend and specs."""
    from kvarn.vllm.backend import KvarnBackend
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    with Engine(small_model, kv_cache_dtype="auto") as engine:
        engine.run(prompts[:1], tokens=2)
        runner = engine.llm.llm_engine.model_executor.driver_worker.model_runner
        (group,) = engine.groups()
        assert type(group.kv_cache_spec) is FullAttentionSpec
        assert not issubclass(runner.attn_groups[0][0].backend, KvarnBackend)


def test_names_are_known():
    from kvarn.vllm import PRESETS

    assert PRESET in PRESETS and len(PRESETS) == 32
