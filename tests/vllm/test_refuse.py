# SPDX-License-Identifier: Apache-2.0
"""What cannot be served is refused before a model runs, with what was found and what to do."""

import re
from pathlib import Path
from types import SimpleNamespace

import kvarn
import pytest
import torch
from engine import PRESET
from kvarn.vllm import hooks, layers, limits, refuse
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.selector import AttentionSelectorConfig


def config(**changes) -> SimpleNamespace:
    """A configuration that is served, with `changes` ("part__attribute") made to it."""
    model = SimpleNamespace(
        use_mla=False,
        is_hybrid=False,
        is_attention_free=False,
        is_encoder_decoder=False,
        is_mm_prefix_lm=False,
        rswa_window=None,
        hf_text_config=SimpleNamespace(),
        head_size=64,
        kv_heads=3,
        query_heads=9,
        window=None,
    )
    model.get_head_size = lambda: model.head_size
    model.get_num_kv_heads = lambda parallel: model.kv_heads
    model.get_num_attention_heads = lambda parallel: model.query_heads
    model.get_sliding_window = lambda: model.window
    made = SimpleNamespace(
        model_config=model,
        cache_config=SimpleNamespace(
            cache_dtype=PRESET, block_size=128, user_specified_block_size=True, kv_cache_dtype_skip_layers=[]
        ),
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1, prefill_context_parallel_size=1, pipeline_parallel_size=1
        ),
        speculative_config=None,
        kv_transfer_config=None,
        additional_config={},
    )
    for path, value in changes.items():
        owner, _, attribute = path.rpartition("__")
        setattr(getattr(made, owner) if owner else made, attribute, value)
    return made


def drafts(method: str, number: int) -> SimpleNamespace:
    return SimpleNamespace(method=method, num_speculative_tokens=number)


SERVED = [
    {},
    {"cache_config__block_size": 640},
    {"cache_config__block_size": 16, "cache_config__user_specified_block_size": False},
    {"speculative_config": drafts("ngram", 28)},
    {"speculative_config": drafts("ngram_gpu", 4)},
    {"speculative_config": drafts("suffix", 4)},
    {"additional_config": {"kvarn_encoder": "varnorm"}},
    {"speculative_config": drafts("eagle3", 4)},
    {"kv_transfer_config": SimpleNamespace(kv_connector="OffloadingConnector")},
    {"model_config__window": 512},
    {"model_config": None},
    {"additional_config": {"kvarn_layers": {"0": "kvarn_k8v4_g128"}}},
]
OWN = {"additional_config": {"kvarn_layers": {"0": "kvarn_k8v4_g128"}}}
REFUSED = [
    ({"additional_config": {"kvarn_layers": {"0": "fp8"}}}, "names the preset 'fp8'"),
    (OWN | {"model_config__window": 512}, "kvarn_layers beside layers with a sliding window"),
    (OWN | {"parallel_config__pipeline_parallel_size": 2}, "kvarn_layers beside pipeline parallelism"),
    (OWN | {"kv_transfer_config": SimpleNamespace(kv_connector="OffloadingConnector")}, "beside a KV connector"),
    ({"model_config__use_mla": True}, "multi-head latent attention"),
    ({"model_config__is_hybrid": True}, "state-space layers, on a CPU"),
    ({"model_config__is_encoder_decoder": True}, "cross attention"),
    ({"model_config__is_mm_prefix_lm": True}, "both directions"),
    ({"model_config__rswa_window": 128}, "reference sliding windows"),
    ({"model_config__hf_text_config": SimpleNamespace(attention_chunk_size=8192)}, "chunked local"),
    ({"model_config__head_size": 112}, "head_dim"),
    ({"model_config__query_heads": 195}, "65 query heads per KV head"),
    (
        {"model_config__window": 512, "scheduler_config__disable_hybrid_kv_cache_manager": True},
        "hybrid KV cache manager is disabled",
    ),
    ({"parallel_config__decode_context_parallel_size": 2}, "context parallelism"),
    ({"parallel_config__prefill_context_parallel_size": 2}, "context parallelism"),
    (
        {"parallel_config__pipeline_parallel_size": 2, "cache_config__kv_cache_dtype_skip_layers": ["0"]},
        "pipeline parallelism",
    ),
    ({"cache_config__block_size": 64}, "--block-size 64 is not a multiple of 128"),
    ({"speculative_config": drafts("ngram", 29)}, "29 drafts per step, where a page has room for 28"),
    ({"speculative_config": drafts("dflash", 2)}, "speculative method dflash"),
    ({"kv_transfer_config": SimpleNamespace(kv_connector="NixlConnector")}, "KV connector NixlConnector"),
    ({"additional_config": {"kvarn_encoder": "best"}}, "encoder 'best'; allowed are weighted and varnorm"),
    ({"additional_config": {"kvarn_feedback": "yes"}}, "feedback 'yes'; allowed are on and off"),
]


@pytest.mark.parametrize("changes", SERVED, ids=str)
def test_served(changes):
    hooks.check_config(config(**changes))


@pytest.mark.parametrize(("changes", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_refused(changes, words):
    with pytest.raises(refuse.Refused) as caught:
        hooks.check_config(config(**changes))
    assert words in str(caught.value) and PRESET in str(caught.value)


def test_the_guide_names_every_limit_and_option():
    guide = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    for limit in limits.LIMITS:
        assert f"| {limit.what} | {limit.remedy} |" in guide
    asked = set(re.findall(r'"(kvarn_[a-z]+)"', Path(refuse.__file__).read_text() + Path(layers.__file__).read_text()))
    described = set(re.findall(r"^\| `(kvarn_[a-z]+)` \|", guide, re.MULTILINE))
    assert described == asked != set()


def test_every_reason_at_once():
    with pytest.raises(refuse.Refused) as caught:
        hooks.check_config(config(model_config__use_mla=True, kv_transfer_config=SimpleNamespace()))
    assert str(caught.value).count("\n - ") == 2


@pytest.mark.parametrize("changes", [changes for changes, _ in REFUSED], ids=[words for _, words in REFUSED])
def test_a_vllm_that_did_not_ask_is_left_alone(changes):
    hooks.check_config(config(**changes, cache_config__cache_dtype="auto"))


def test_other_platforms(monkeypatch):
    monkeypatch.setattr(refuse.compat, "platform_name", lambda: "xpu")
    with pytest.raises(refuse.Refused, match="xpu platform"):
        hooks.check_config(config())


@pytest.fixture
def gpu(monkeypatch):
    """An NVIDIA GPU and a build for it, by all that is asked of them."""
    monkeypatch.setattr(refuse.compat, "platform_name", lambda: "cuda")
    monkeypatch.setattr(refuse.compat, "capability", lambda: (9, 0))
    monkeypatch.setattr(refuse.kvarn, "cuda_shapes", lambda: ["k4v2_g128_d64", "k4v2_g128_d128"])
    return monkeypatch


def test_a_gpu_is_served(gpu):
    hooks.check_config(config())
    hooks.check_config(config(additional_config={"kvarn_prompts": "exact"}))
    hooks.check_config(config(model_config__is_hybrid=True))


@pytest.mark.parametrize(("changes", "words"), [
    ({"model_config__head_size": 96}, "no CUDA kernels of k4v2_g128_d96, but of k4v2_g128_d64, k4v2_g128_d128"),
    ({"model_config__query_heads": 51}, "17 query heads per KV head, and 16 is the most"),
    ({"parallel_config__enable_dbo": True}, "dual batch overlap"),
    ({"additional_config": {"kvarn_prompts": "fast"}}, "prompts 'fast'; allowed are flash and exact"),
    ({"additional_config": {"kvarn_pack": "later"}}, "pack 'later'; allowed are step and layer"),
])  # fmt: skip
def test_refused_on_a_gpu(gpu, changes, words):
    with pytest.raises(refuse.Refused, match=words):
        hooks.check_config(config(**changes))


def test_a_build_without_kernels(gpu):
    gpu.setattr(refuse.kvarn, "cuda_shapes", list)
    with pytest.raises(refuse.Refused, match="built without CUDA kernels"):
        hooks.check_config(config())


def test_an_old_gpu(gpu):
    gpu.setattr(refuse.compat, "capability", lambda: (7, 5))
    with pytest.raises(refuse.Refused, match=r"compute capability 7\.5"):
        hooks.check_config(config())


def test_missing_hook(monkeypatch):
    hook = limits.contract.Hook("pages ahead", False, "no FullAttentionManager")
    monkeypatch.setattr(limits.contract, "probe", lambda: [hook])
    with pytest.raises(refuse.Refused, match="lacks pages ahead"):
        hooks.check_config(config())


@pytest.mark.parametrize(
    ("feature", "words"),
    [
        ({"use_mla": True}, "latent"),
        ({"has_sink": True}, "sinks"),
        ({"use_sparse": True}, "sparse"),
        ({"use_mm_prefix": True}, "prefixes"),
        ({"has_sliding_window": True}, "sliding window"),
        ({"use_non_causal": True}, "causal"),
        ({"attn_type": "encoder_only"}, "decoder"),
        ({"head_size": 72}, "head_dim"),
    ],
)
def test_layers(feature, words):
    served = {"head_size": 64, "dtype": torch.bfloat16, "kv_cache_dtype": PRESET, "block_size": 128}
    assert hooks.backend_path(AttentionSelectorConfig(**served)).endswith(PRESET)
    with pytest.raises(ValueError, match=words):
        hooks.backend_path(AttentionSelectorConfig(**(served | feature)))
    assert hooks.backend_path(AttentionSelectorConfig(**(served | feature | {"kv_cache_dtype": "auto"}))) is None


@pytest.mark.parametrize(
    "argument",
    [
        {"alibi_slopes": [0.5]},
        {"sliding_window": 512},
        {"kv_sharing_target_layer_name": "model.layers.3"},
        {"attn_type": "encoder_decoder"},
    ],
    ids=str,
)
def test_arguments_of_a_layer(argument):
    served = {"attn_type": "decoder", "alibi_slopes": None, "sliding_window": None, "chunk_lookback": -1}
    layout = kvarn.Layout(PRESET, head_dim=64, kv_heads=3)
    refuse.check_impl(layout, 9, **served)
    with pytest.raises(refuse.Refused, match=PRESET):
        refuse.check_impl(layout, 9, **(served | argument))
    with pytest.raises(refuse.Refused, match="65 query heads per KV head"):
        refuse.check_impl(layout, 195, **served)


def test_windows_are_left_in_16_bits():
    asked = config(model_config__window=512)
    hooks.check_config(asked)
    hooks.check_config(asked)
    assert asked.cache_config.kv_cache_dtype_skip_layers == ["sliding_window"]


def test_masks_other_than_causal():
    from kvarn.vllm.cpu import Builder

    builder = object.__new__(Builder)
    with pytest.raises(refuse.Refused, match="causal"):
        builder.build(0, SimpleNamespace(causal=torch.ones(1, dtype=torch.bool)))
    assert "causal" in CommonAttentionMetadata.__dataclass_fields__


def test_a_real_configuration(small_model):
    from vllm.engine.arg_utils import EngineArgs

    arguments = EngineArgs(model=str(small_model), kv_cache_dtype=PRESET, block_size=96)
    with pytest.raises(ValueError, match="--block-size 96 is not a multiple of 128; leave --block-size out"):
        arguments.create_engine_config()
    with pytest.raises(ValueError, match="kvarn_k5v2_g128"):
        EngineArgs(model=str(small_model), kv_cache_dtype="kvarn_k5v2_g128").create_engine_config()
