# SPDX-License-Identifier: Apache-2.0
"""Specs, the manager and the metadata, without an engine."""

from dataclasses import replace
from types import SimpleNamespace

import kvarn
import pytest
import torch
from engine import PRESET
from kvarn.vllm import backend, blocks, cpu, offload, refuse, spec
from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec, SlidingWindowSpec, UniformTypeKVCacheSpecs

CONFIG = SimpleNamespace(
    model_config=SimpleNamespace(max_model_len=1000),
    parallel_config=SimpleNamespace(decode_context_parallel_size=1),
)


def full(head_size=64, kv_heads=3, dtype=torch.uint8, block_size=128) -> FullAttentionSpec:
    return FullAttentionSpec(block_size=block_size, num_kv_heads=kv_heads, head_size=head_size, dtype=dtype)


@pytest.mark.parametrize("preset", ["kvarn_k4v2_g128", "kvarn_k8v4_g128", "kvarn_k4v4_g64"])
@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("kv_heads", [1, 3, 8])
def test_a_block_holds_its_pages(preset, head_size, kv_heads):
    layout = kvarn.Layout(preset, head_dim=head_size, kv_heads=kv_heads)
    packed = spec.packed(full(head_size, kv_heads), preset)
    pages = packed.block_size // layout.page_tokens
    assert 0 <= packed.page_size_bytes - pages * layout.page_bytes < packed.block_size
    assert packed.page_size_bytes % 16 == 0 and packed.page_size_bytes // pages % 16 == 0
    assert packed.num_heads * packed.num_states * packed.state_content_size_bytes == packed.page_size_bytes
    shape = backend.KvarnBackend.get_kv_cache_shape.__func__(
        SimpleNamespace(preset=preset), 7 * pages, layout.page_tokens, kv_heads, head_size
    )
    assert torch.empty(shape, device="meta").numel() == 7 * packed.page_size_bytes


@pytest.mark.parametrize("layer", [spec.KvarnSpec, spec.AheadSpec])
def test_rows_and_memory_count_the_pages_ahead(layer):
    made = layer.of(spec.packed(full(), PRESET)) if layer is spec.KvarnSpec else layer.of(full(), tokens_ahead=640)
    assert made.max_num_blocks_per_req(CONFIG, 1000) == 8 + 5
    assert made.max_num_blocks_per_req(CONFIG, 1024) == 8 + 5
    assert made.max_num_blocks_per_req(CONFIG, 1025) == 9 + 5
    assert made.max_memory_usage_bytes(CONFIG) == 13 * made.page_size_bytes


def test_merging_keeps_what_vllm_does_not_know():
    packed = spec.packed(full(), PRESET)
    assert spec.KvarnSpec.merge([packed, packed]) == packed
    with pytest.raises(AssertionError, match="agree"):
        spec.KvarnSpec.merge([packed, spec.KvarnSpec.of(packed, tokens_ahead=512)])


WINDOW = SlidingWindowSpec(block_size=32, num_kv_heads=3, head_size=64, dtype=torch.bfloat16, sliding_window=99)


def test_packed_and_16_bit_layers_share_rows():
    layers = {
        name: SimpleNamespace(kv_cache_dtype=dtype, head_size=64, num_kv_heads=3)
        for name, dtype in (("first", "auto"), ("second", PRESET))
    }
    config = SimpleNamespace(
        cache_config=SimpleNamespace(cache_dtype=PRESET),
        compilation_config=SimpleNamespace(static_forward_context=layers),
    )
    plain = spec.of_layer(layers["first"], full(dtype=torch.bfloat16), config)
    packed = spec.of_layer(layers["second"], full(), config)
    assert type(plain) is spec.AheadSpec and plain.page_size_bytes == full(dtype=torch.bfloat16).page_size_bytes
    assert type(packed) is spec.KvarnSpec and packed.page_size_bytes == 3 * 7296
    assert plain.tokens_ahead == packed.tokens_ahead == 640
    spec.register()
    group = UniformTypeKVCacheSpecs.from_specs({"first": plain, "second": packed})
    assert group.max_num_blocks_per_req(CONFIG, 1000) == 13


@pytest.mark.parametrize(("block_size", "tokens"), [(128, 16), (640, 128), (1280, 256), (768, 128)])
def test_windowed_layers_fit_into_packed_blocks(block_size, tokens, monkeypatch):
    monkeypatch.setattr(spec.compat, "platform_name", lambda: "cuda")
    packed = SimpleNamespace(kv_cache_dtype=PRESET, head_size=64, num_kv_heads=3)
    config = SimpleNamespace(
        cache_config=SimpleNamespace(cache_dtype=PRESET, block_size=block_size),
        compilation_config=SimpleNamespace(static_forward_context={"packed": packed}),
    )
    made = spec.of_layer(SimpleNamespace(kv_cache_dtype="auto"), WINDOW, config)
    assert type(made) is spec.WindowSpec and made.block_size == tokens
    assert made.page_size_bytes == 7296 * 3 * block_size // 128
    config.cache_config.block_size = 128
    with pytest.raises(refuse.Refused, match="98304 bytes for 16 tokens"):
        spec.of_layer(SimpleNamespace(kv_cache_dtype="auto"), replace(WINDOW, num_kv_heads=24), config)


@pytest.mark.parametrize(
    ("found", "tokens", "kept"), [(128, 128, 0), (256, 256, 128), (256, 257, 256), (200, 900, 128)]
)
def test_hits_from_host_memory_end_before_the_last_token(found, tokens, kept):
    assert offload.whole_blocks(found, tokens, 128) == kept


def pool(*layers, block_size=128, **cache) -> SimpleNamespace:
    """A configuration with these layers, its block size as vLLM chose it."""
    settings = {"cache_dtype": PRESET, "block_size": block_size, "mamba_cache_mode": "align"} | cache
    return SimpleNamespace(
        cache_config=SimpleNamespace(**settings),
        compilation_config=SimpleNamespace(static_forward_context=dict(enumerate(layers))),
    )


@pytest.mark.parametrize(("state", "window", "block_size", "settled"), [
    (0, None, 128, 128),
    (0, None, 384, 384),  # as a user asked
    (0, None, 16, 128),  # as vLLM chose for another backend
    (0, 512, 16, 640),
    (50_000, None, 1024, 384),
    (50_000, 512, 1024, 640),
    (150_000, 512, 1024, 896),
])  # fmt: skip
def test_blocks_that_packed_layers_share(monkeypatch, state, window, block_size, settled):
    monkeypatch.setattr(blocks.compat, "platform_name", lambda: "cuda")
    page = 3 * 7296
    spec_of_state = MambaSpec(block_size=64, shapes=((state,),), dtypes=(torch.uint8,), page_size_padded=10**6)
    layers = [
        SimpleNamespace(kv_cache_dtype=PRESET, head_size=64, num_kv_heads=3, sliding_window=None),
        SimpleNamespace(kv_cache_dtype="auto", head_size=64, num_kv_heads=3, sliding_window=window),
        SimpleNamespace(),  # experts are listed too
    ] + [SimpleNamespace(get_kv_cache_spec=lambda config: spec_of_state)] * bool(state)
    config = pool(*layers, block_size=block_size)
    blocks.settle(config)
    assert config.cache_config.block_size == settled
    if state:
        assert config.cache_config.mamba_block_size == settled
        assert config.cache_config.mamba_page_size_padded == settled // 128 * page >= state


def test_a_pool_without_packed_layers():
    with pytest.raises(refuse.Refused, match="nothing to pack"):
        blocks.settle(pool(SimpleNamespace(kv_cache_dtype="auto", sliding_window=512)))


def test_other_kinds_of_layers():
    config = SimpleNamespace(cache_config=SimpleNamespace(cache_dtype=PRESET))
    assert spec.of_layer(SimpleNamespace(kv_cache_dtype=PRESET), None, config) is None
    unequal = replace(full(), head_size_v=128)
    for made in (replace(WINDOW, dtype=torch.uint8), unequal):
        with pytest.raises(refuse.Refused, match=PRESET):
            spec.packed(made, PRESET)


def test_sizes_asked_before_layers_exist():
    ours = getattr(backend, f"Backend_{PRESET}")
    assert ours is getattr(backend, f"Backend_{PRESET}") and ours.get_name() == "CUSTOM"
    assert ours.get_supported_kernel_block_sizes() == [128]
    per_token = ours.customize_spec(full(block_size=1))
    assert per_token.page_size_bytes == 3 * 57
    plain = full(dtype=torch.bfloat16)
    assert ours.customize_spec(plain) is plain
    with pytest.raises(AttributeError):
        backend.Backend_  # noqa: B018


def batch(seq_lens, queries, slots) -> SimpleNamespace:
    starts = torch.tensor([0, *torch.tensor(queries).cumsum(0).tolist()], dtype=torch.int32)
    return SimpleNamespace(
        num_reqs=len(seq_lens),
        num_actual_tokens=sum(queries) + 3,  # vLLM may pad
        causal=True,
        query_start_loc=starts,
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        block_table_tensor=torch.zeros((len(seq_lens) + 2, 9), dtype=torch.int32),
        slot_mapping=torch.tensor(slots),
    )


def test_dummy_requests_take_no_part():
    builder = object.__new__(cpu.Builder)
    builder.workspace_bytes = 64
    # A real request, a dummy one with a stale length, a real one, padding without tokens.
    made = builder.build(0, batch([5, 7, 300, 0], [2, 2, 1, 0], [3, 4, -1, -1, 299]))
    assert made.seq_lens.tolist() == [5, 0, 300, 0] and made.seq_lens.dtype == torch.int32
    assert made.query_starts.tolist() == [0, 2, 4, 5, 5]
    assert made.block_table.shape == (4, 9) and made.num_tokens == 5
    assert made.workspace.numel() >= 64 and made.workspace.data_ptr() % 64 == 0


def test_prompts_take_turns_where_they_do_not_fit():
    from kvarn.vllm import prompts

    plan = SimpleNamespace(layout=kvarn.Layout(PRESET, head_dim=64, kv_heads=3))
    # A decoding request, 300 tokens at once, the last 100 of 1,000, padding, 640 at once: 5, 8 and 9 pages.
    batch = SimpleNamespace(
        num_reqs=5,
        query_start_loc_cpu=torch.tensor([0, 1, 301, 401, 401, 1041]),
        seq_lens_cpu_upper_bound=torch.tensor([700, 300, 1000, 0, 640]),
    )
    step = prompts.Step.of(batch, 1, plan, SimpleNamespace(pages=20))
    assert step.first_row == 1
    assert step.groups == [prompts.Group(range(1, 3), 3 + 1, 1000), prompts.Group(range(4, 5), 5, 640)]
    assert len(prompts.Step.of(batch, 1, plan, SimpleNamespace(pages=22)).groups) == 1


def test_sinks_keep_their_address_when_weights_are_loaded_again():
    from kvarn.vllm.gpu import Impl

    layer = SimpleNamespace(sinks=torch.ones(4, dtype=torch.bfloat16), _logits=None)
    Impl.process_weights_after_loading(layer, torch.bfloat16)
    first, layer.sinks = layer._logits, layer.sinks * 2
    Impl.process_weights_after_loading(layer, torch.bfloat16)
    assert layer._logits is first and first.tolist() == [2.0] * 4
