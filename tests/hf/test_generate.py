"""generate() of transformers on kvarn.hf.Cache, on tiny models: what it answers does not depend on how it is asked."""

import copy

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import kvarn  # noqa: E402
from kvarn import reference  # noqa: E402
from models import KINDS, assert_same_answer, generate, kvarn_cache, logits, needs_5, needs_5_19, prompt, tiny  # noqa: E402
from transformers import DynamicCache, StaticCache  # noqa: E402

SINKS = {"gpt_oss"}
SERVED = sorted(set(KINDS) - SINKS)


@pytest.fixture(params=sorted(KINDS))
def model(request, device):
    if request.param in SINKS and device == "cpu":
        pytest.skip("the CPU verbs have no sinks; test_hf_refuse.py has what is said then")
    return tiny(request.param, device, "eager" if request.param in ("gemma2", "gpt_oss") else "sdpa")


def test_short_contexts_are_16_bit(model):
    """Nothing is packed below a tile: the same logits as with transformers' own cache, but for binary16."""
    ids = prompt(2, 100, device=model.device)
    exact = logits(model, ids, DynamicCache(config=model.config))
    ours = logits(model, ids, kvarn_cache(model.config))
    assert (ours - exact).norm() <= 4e-3 * exact.norm()


def test_bits_decide_the_error(model):
    ids = prompt(1, 400, device=model.device)
    exact = logits(model, ids, DynamicCache(config=model.config))
    errors = [
        float((logits(model, ids, kvarn_cache(model.config, preset=preset)) - exact).norm() / exact.norm())
        for preset in ("kvarn_k8v4_g128", "kvarn_k4v2_g128")
    ]
    assert 1e-4 < errors[0] < errors[1] < 0.5


def test_layers_of_other_presets(device):
    """What one cache holds in two presets is what caches of one preset hold of it, crops and chunks included."""
    model, ids = tiny("llama", device), prompt(2, 400, device=device)
    fine, coarse = "kvarn_k8v4_g128", "kvarn_k4v2_g128"
    own = kvarn_cache(model.config, preset=coarse, layers={0: fine, 2: fine})
    assert [layer.preset for layer in own.packed_layers] == [fine, coarse, fine]
    mixed = logits(model, ids, own)
    first = kvarn_cache(model.config, preset=fine)
    logits(model, ids, first)
    assert torch.equal(own.layers[0].pages[:3], first.layers[0].pages[:3])  # whole tiles of the first row
    same = kvarn_cache(model.config, preset=fine, layers={"0-2": coarse})
    assert torch.equal(logits(model, ids, same), logits(model, ids, kvarn_cache(model.config, preset=coarse)))
    own.crop(-20)  # within what the smaller of the pages keep of 16 bits
    own.crop(-(380 - 256))
    again = torch.cat([logits(model, part, own) for part in ids[:, 256:].split(50, dim=1)], dim=1)
    # A GPU's matrix products round otherwise with fewer rows: some codes differ (4e-3 measured on an H200).
    within = 1e-4 if device == "cpu" else 2e-2
    torch.testing.assert_close(again, mixed[:, 256:], rtol=within, atol=within)


@pytest.mark.parametrize("kind", SERVED)
def test_agrees_with_the_reference_verbs(kind, monkeypatch):
    model = tiny(kind)
    ids = prompt(1, 300)
    ours = logits(model, ids, kvarn_cache(model.config))
    verbs = {name: getattr(reference, name) for name in ("append", "attend")}
    state: dict = {}

    def append(*args, plan, encoder, feedback, balance):
        return verbs["append"](
            *(x.numpy() if hasattr(x, "numpy") else x for x in args),
            encoder=encoder,
            feedback=feedback,
            balance=balance,
            workspace=state,
        )

    def attend(*args, plan, sinks, **options):
        out = verbs["attend"](*(x.numpy() if hasattr(x, "numpy") else x for x in args), **options, workspace=state)
        return torch.from_numpy(out).to(args[-1].dtype)

    monkeypatch.setattr(kvarn, "append", append)
    monkeypatch.setattr(kvarn, "attend", attend)
    exact = logits(model, ids, kvarn_cache(model.config))
    # Three layers, each within 4.8e-4 (tests/python/tolerance.py), after which K and V of the next round differently.
    assert (ours - exact).norm() <= 1e-2 * exact.norm()


def test_padded_batch_answers_as_each_prompt_alone(model):
    ids, mask = prompt(3, 280, device=model.device), torch.ones(3, 280, dtype=torch.long, device=model.device)
    mask[0, :133], mask[1, :1] = 0, 0
    answers = generate(model, ids, kvarn_cache(model.config), mask=mask)
    for row, start in enumerate((133, 1, 0)):
        one = generate(model, ids[row : row + 1, start:], kvarn_cache(model.config))
        assert_same_answer(model, answers[row, start:], one[0])


@pytest.mark.parametrize("padded", [0, pytest.param(150, marks=needs_5)])
def test_chunked_prefill(model, padded):
    ids, mask = prompt(2, 300, device=model.device), torch.ones(2, 300, dtype=torch.long, device=model.device)
    mask[0, :padded] = 0
    whole = generate(model, ids, kvarn_cache(model.config), mask=mask)
    parts = generate(model, ids, kvarn_cache(model.config), mask=mask, prefill_chunk_size=70)
    assert_same_answer(model, whole[0, padded:], parts[0, padded:])
    assert_same_answer(model, whole[1], parts[1])


def test_beam_search_scores_are_those_of_its_answers(model):
    """What a beam search says an answer is worth is what the answer is worth when read in one go."""
    ids, mask = prompt(2, 270, device=model.device), torch.ones(2, 270, dtype=torch.long, device=model.device)
    mask[0, :30] = 0
    options = dict(num_beams=4, num_return_sequences=4, return_dict_in_generate=True, output_scores=True)
    found = generate(model, ids, kvarn_cache(model.config), mask=mask, length_penalty=0.0, **options)
    masks = torch.cat([mask.repeat_interleave(4, 0), torch.ones_like(found.sequences[:, 270:])], dim=1)
    positions = (masks.cumsum(1) - 1).clamp(min=0)  # generate counts from each row's first token
    cache = kvarn_cache(model.config)
    again = logits(model, found.sequences, cache, attention_mask=masks, position_ids=positions).log_softmax(-1)
    chosen = again[:, 269:-1].gather(2, found.sequences[:, 270:, None]).squeeze(2)
    assert torch.allclose(chosen.sum(1), found.sequences_scores, rtol=1e-3, atol=0.1)
    assert len(set(map(tuple, found.sequences.tolist()))) == 8


def test_sampling_is_reproducible(model):
    answers = []
    for _ in range(2):
        torch.manual_seed(3)
        options = dict(do_sample=True, num_return_sequences=3, temperature=0.7)
        answers.append(generate(model, prompt(1, 250, device=model.device), kvarn_cache(model.config), **options))
    assert torch.equal(*answers) and len(answers[0]) == 3


@needs_5
@pytest.mark.parametrize("drafts", [3, 20])
def test_prompt_lookup_answers_as_greedy(model, drafts):
    # A prompt that repeats itself, so that drafts are found; and 90 tokens, so that a tile is completed on the way.
    ids = prompt(1, 45, device=model.device).repeat(1, 5)
    plain = generate(model, ids, kvarn_cache(model.config), new=90)
    cache = kvarn_cache(model.config)
    assert_same_answer(model, plain[0], generate(model, ids, cache, new=90, prompt_lookup_num_tokens=drafts)[0])
    assert cache.get_seq_length() < plain.shape[1]


def test_an_assistant_model(device):
    model, assistant = tiny("qwen3", device), tiny("qwen3", device)
    torch.manual_seed(1)
    for parameter in assistant.parameters():
        parameter.data += 0.02 * parameter.std() * torch.randn_like(parameter)
    ids = prompt(1, 230, device=device)
    plain = generate(model, ids, kvarn_cache(model.config), new=60)
    helped = generate(model, ids, kvarn_cache(model.config), new=60, assistant_model=assistant)
    assert_same_answer(model, plain[0], helped[0])


def test_continuing_a_chat(model):
    """A second turn on the same cache answers as the whole conversation from the start."""
    cache, first = kvarn_cache(model.config), prompt(2, 200, device=model.device)
    said = generate(model, first, cache, new=30)
    second = torch.cat([said, prompt(2, 50, seed=2, device=model.device)], dim=1)
    for one, other in zip(
        generate(model, second, cache), generate(model, second, kvarn_cache(model.config)), strict=True
    ):
        assert_same_answer(model, one, other)


def test_a_copy_of_a_prefix_cache(model):
    cache, ids = kvarn_cache(model.config), prompt(1, 300, device=model.device)
    logits(model, ids[:, :260], cache)
    whole = generate(model, ids, kvarn_cache(model.config))
    for _ in range(2):
        assert_same_answer(model, generate(model, ids, copy.deepcopy(cache))[0], whole[0])
    assert cache.get_seq_length() == 260


def test_select_and_repeat(model):
    ids = prompt(3, 200, device=model.device)
    cache = kvarn_cache(model.config)
    logits(model, ids, cache)
    cache.batch_select_indices(torch.tensor([2, 0], device=model.device))
    cache.batch_repeat_interleave(2)
    new = prompt(4, 3, seed=2, device=model.device)
    ours = logits(model, new, cache)
    whole = logits(model, torch.cat([ids[[2, 2, 0, 0]], new], dim=1), kvarn_cache(model.config))[:, -3:]
    assert (ours - whole).norm() <= 1e-2 * whole.norm()
    assert cache.batch_size == 4


@needs_5_19
def test_crop_and_again(model):
    ids, cache = prompt(1, 290, device=model.device), kvarn_cache(model.config)
    cache.activate_past_recording()
    logits(model, ids[:, :260], cache)
    before = logits(model, ids[:, 260:], cache)
    cache.crop(-30)
    assert cache.get_seq_length() == 260
    assert torch.allclose(logits(model, ids[:, 260:], cache), before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))
    with pytest.raises(ValueError, match="is packed"):
        cache.crop(-100)
    assert {layer.get_seq_length() for layer in cache.layers} == {290}


@needs_5_19
def test_other_caches_work_as_before(model):
    ids, mask = prompt(2, 120, device=model.device), torch.ones(2, 120, dtype=torch.long, device=model.device)
    mask[1, :50] = 0

    def answers():
        yield logits(model, ids, attention_mask=mask)
        yield generate(model, ids, DynamicCache(config=model.config), mask=mask)
        yield generate(model, ids, StaticCache(config=model.config, max_cache_len=200), mask=mask, disable_compile=True)
        yield generate(model, ids, None, mask=mask, prefill_chunk_size=50)

    before = list(answers())
    kvarn_cache(model.config)
    assert model.config._attn_implementation == "kvarn"
    for one, other in zip(before, answers(), strict=True):
        assert torch.equal(one, other)


def test_the_implementation_may_be_set_first(device):
    ids = prompt(1, 200, device=device)
    first, later = tiny("llama", device, attention="kvarn"), tiny("llama", device)
    answers = [generate(model, ids, kvarn_cache(model.config)) for model in (first, later)]
    assert torch.equal(*answers)
    assert torch.equal(generate(first, ids, None), generate(tiny("llama", device), ids, None))


def test_memory(device):
    model = tiny("llama", device)
    layout = kvarn.Layout("kvarn_k4v2_g128", 64, 2)
    cache = kvarn_cache(model.config)
    assert cache.nbytes == 0
    logits(model, prompt(2, 1000, device=device), cache)
    assert cache.nbytes == 3 * 2 * (8 + layout.pages_ahead) * layout.page_bytes
    exact = DynamicCache(config=model.config)
    logits(model, prompt(2, 1000, device=device), exact)
    sixteen_bit = sum(layer.keys.nbytes + layer.values.nbytes for layer in exact.layers) // 2
    assert cache.nbytes < 0.4 * sixteen_bit
    cache.reset()
    assert cache.nbytes == 0 and cache.get_seq_length() == 0
    assert generate(model, prompt(1, 20, device=device), cache).shape == (1, 60)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_a_cache_at_rest_moves_to_the_cpu(kind):
    if missing := kvarn.cuda_missing():
        pytest.skip(missing)
    model, ids = tiny(kind, "cuda"), prompt(1, 300, device="cuda")
    cache = kvarn_cache(model.config)
    logits(model, ids[:, :260], cache)
    cache.to("cpu")
    if kind == "llama":  # Gemma's first layer is transformers' own, and counts the tokens before it fails
        with pytest.raises(ValueError, match="move them"):
            logits(model, ids[:, 260:], cache)
    ours = logits(model, ids[:, 260:], cache.to("cuda"))
    whole = logits(model, ids, kvarn_cache(model.config))[:, 260:]
    assert (ours - whole).norm() <= 1e-2 * whole.norm()
