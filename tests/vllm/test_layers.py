# SPDX-License-Identifier: Apache-2.0
"""Presets of some layers' own (kvarn_layers)."""

import pytest
from engine import CACHE, GPU, GRAPHS, PRESET, Engine, first_difference
from kvarn.vllm import layers
from kvarn.vllm.refuse import Refused
from test_refuse import config

FINE = "kvarn_k8v4_g128"
OWN = {"0": FINE, "2-3": "kvarn_k4v4_g128"}
# What `kvarn eval layers` finds: the smallest preset in layers that bear it, which pays for others.
MIXED = {"0": FINE, "1": "kvarn_k4v2_g128", "3": "kvarn_k4v3_g128", "4": "kvarn_k4v4_g128"}
FIVE = {"kv_cache_dtype": "kvarn_k2v2_g128", "additional_config": {"kvarn_layers": MIXED}}


def names(engine) -> list[str]:
    return [layer.layout.preset for layer in impls(engine)]


def impls(engine) -> list:
    runner = engine.llm.llm_engine.model_executor.driver_worker.model_runner
    found = runner.vllm_config.compilation_config.static_forward_context
    return [found[name].impl for name in sorted(found)]


def missed_and_hit(model, some, whole, **options) -> None:
    """The prompts `some` are answered as in `whole`, without hits and with them."""
    with Engine(model, **options) as engine:
        cold, warm = engine.run(some), engine.run(some)
        assert engine.counters()["hits"] > 0
    assert first_difference(cold, whole) is None
    assert first_difference(warm, whole) is None


@pytest.mark.parametrize("given", [OWN, '{"0": "kvarn_k8v4_g128", "2-3": "kvarn_k4v4_g128"}'], ids=["object", "text"])
def test_what_is_asked(given):
    asked = layers.asked(config(additional_config={"kvarn_layers": given}), PRESET)
    assert asked == {0: FINE, 2: "kvarn_k4v4_g128", 3: "kvarn_k4v4_g128"}


def test_the_environment(monkeypatch):
    monkeypatch.setenv("KVARN_LAYERS", '{"5": "kvarn_k8v4_g128"}')
    assert layers.asked(config(), PRESET) == {5: FINE}
    assert layers.asked(config(additional_config={"kvarn_layers": OWN}), PRESET).keys() == {0, 2, 3}


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("0=kvarn_k8v4_g128", "must be a JSON object"),
        (["0"], "must be a JSON object"),
        ({"first": FINE}, "must be a JSON object"),
        ({"1-": FINE}, "must be a JSON object"),
        ({"0": "fp8"}, "names the preset 'fp8'; allowed are kvarn_k"),
        ({"0": 4}, "names the preset 4"),
        ({"0-2": FINE, "2": FINE}, "names a layer twice"),
        ({"0": "kvarn_k8v4_g64"}, "tiles have other lengths"),
    ],
    ids=str,
)
def test_what_makes_no_sense(given, reason):
    with pytest.raises(Refused, match=reason):
        layers.asked(config(additional_config={"kvarn_layers": given}), PRESET)


@pytest.mark.usefixtures("row_by_row")
@pytest.mark.parametrize("how", [{}, pytest.param(GRAPHS, marks=GPU)], ids=["eager", "graphs"])
def test_it_serves(small_model, prompts, base, how):
    """Each layer has its preset, more bytes are used, and answers are exact over chunks, hits and preemption."""
    some, options = prompts[3:7], how | {"additional_config": {"kvarn_layers": OWN}}
    with Engine(small_model, **options) as engine:
        whole = engine.run(some)
        assert names(engine) == [FINE, PRESET, "kvarn_k4v4_g128", "kvarn_k4v4_g128", PRESET, PRESET]
        (group,) = engine.groups()
        pages = {spec.page_size_bytes for spec in group.kv_cache_spec.kv_cache_specs.values()}
        assert len(pages) == 3
        assert len({spec.tokens_ahead for spec in group.kv_cache_spec.kv_cache_specs.values()}) == 1
    assert first_difference(whole, base[3:7]) is not None
    tight = {"enable_prefix_caching": True, "max_num_batched_tokens": 100, "num_gpu_blocks_override": 24}
    missed_and_hit(small_model, some, whole, **options, **tight)


@pytest.mark.usefixtures("row_by_row")
@pytest.mark.parametrize("how", [{}, pytest.param(GRAPHS, marks=GPU)], ids=["eager", "graphs"])
def test_five_presets(small_model, prompts, how):
    """Exact over chunks and hits, on pages of which the smallest hold the fewest raw tokens."""
    some, options = prompts[3:7], how | FIVE
    with Engine(small_model, **options) as engine:
        whole = engine.run(some)
        assert names(engine) == [FINE, MIXED["1"], "kvarn_k2v2_g128", MIXED["3"], MIXED["4"], "kvarn_k2v2_g128"]
    missed_and_hit(small_model, some, whole, **options, **CACHE, max_num_batched_tokens=100)


@pytest.mark.usefixtures("row_by_row")
@pytest.mark.parametrize("how", [pytest.param({}, marks=GPU), pytest.param(GRAPHS, marks=GPU)], ids=["eager", "graphs"])
def test_prompts_on_flash_attention(small_model, prompts, monkeypatch, how):
    """All presets expand their pages into the same room, one layer after the other."""
    monkeypatch.setenv("KVARN_PROMPTS", "flash")
    some, options = prompts[3:7], how | FIVE
    with Engine(small_model, **options) as engine:
        whole = engine.run(some)
        assert len({id(layer.memory) for layer in impls(engine)}) == 5
        assert len({id(layer.memory.prompts) for layer in impls(engine)}) == 1
    missed_and_hit(small_model, some, whole, **options, **CACHE, max_num_batched_tokens=333)


def test_a_layer_that_is_not_there(small_model):
    with pytest.raises(ValueError, match=r"kvarn_layers names layers \[6\]; packed are \[0, 1, 2, 3, 4, 5\]"):
        Engine(small_model, additional_config={"kvarn_layers": {"6": FINE}}).__enter__()
