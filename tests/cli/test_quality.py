# SPDX-License-Identifier: Apache-2.0
"""The quality run: its statistics on numbers made up for it, its caches on a small random model."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the quality run needs torch")
transformers = pytest.importorskip("transformers", reason="the quality run needs transformers")

import kvarn  # noqa: E402
from kvarn.quality import measure, report, statistics, text  # noqa: E402
from kvarn.quality.attention import Kept, Packed, attending  # noqa: E402
from kvarn.quality.measure import Scores  # noqa: E402
from kvarn.quality.run import Result, Runner, Setting, settings  # noqa: E402


def scores(kld, nll=None, reference_nll=None, same_top=None):
    kld = np.asarray(kld, np.float32)
    zeros = np.zeros_like(kld)
    return Scores(
        kld,
        zeros if nll is None else nll,
        zeros if reference_nll is None else reference_nll,
        np.ones(kld.shape, bool) if same_top is None else same_top,
    )


def test_summary_of_known_numbers():
    kld = np.arange(1000, dtype=np.float32)
    row = statistics.summary(scores(kld[::-1], same_top=kld < 250))
    assert (row.tokens, row.mean, row.median) == (1000, 499.5, 499.5)
    assert row.trimmed == np.arange(990).mean()
    assert row.p99 == pytest.approx(989.01)
    assert row.same_top_percent == 25


def test_perplexity_change_and_its_interval():
    noise = np.random.default_rng(1).normal(0, 0.5, 128 * 60).astype(np.float32)
    row = statistics.summary(
        scores(np.ones(noise.size), nll=3 + noise + np.float32(np.log(1.1)), reference_nll=3 + noise)
    )
    assert row.perplexity_percent.value == pytest.approx(10, abs=1e-3)
    row = statistics.summary(scores(np.ones(noise.size), nll=noise, reference_nll=np.zeros_like(noise)))
    assert row.perplexity_percent.low < 0 < row.perplexity_percent.high


def test_ratios_are_paired():
    rough = np.random.default_rng(2).lognormal(size=128 * 40)
    mean = statistics.mean_ratio(scores(rough / 2), scores(rough))
    median = statistics.median_ratio(scores(rough / 2), scores(rough))
    for ratio in (mean, median):
        assert (ratio.value, ratio.low, ratio.high) == pytest.approx((0.5, 0.5, 0.5))
    other = statistics.mean_ratio(scores(np.roll(rough, 999)), scores(rough))
    assert other.low < 1 < other.high
    with pytest.raises(ValueError, match="not paired"):
        statistics.mean_ratio(scores(rough), scores(rough[:-128]))


def test_less_than_a_block_is_an_error():
    with pytest.raises(ValueError, match="at least one block"):
        statistics.summary(scores(np.ones(127)))


class Words:
    """A tokenizer of one token per word."""

    def __call__(self, text):
        return {"input_ids": [int(word) for word in text.split()]}


def test_contexts_are_apart_and_stay_when_more_are_asked(tmp_path):
    path = tmp_path / "text"
    path.write_text(" ".join(map(str, range(40_000))))
    two, three = (text.contexts(path, Words(), count, 100) for count in (2, 3))
    assert two.shape == (2, 101)
    assert (three[:2] == two).all()
    assert (three[:, 0] == np.arange(3) * text.SPACING).all()
    assert text.contexts(path, Words(), 300, 100).shape == (300, 101)
    with pytest.raises(ValueError, match="too few for 400 contexts"):
        text.contexts(path, Words(), 400, 100)
    with pytest.raises(FileNotFoundError, match="--text"):
        text.contexts(tmp_path / "other", Words(), 1, 100)


LENGTH = 300


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(5)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        initializer_range=0.1,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(6).integers(0, 97, LENGTH + 1)


def compared(model, tokens, cache):
    reference = measure.hidden_states(model, tokens[:-1], Kept())
    return measure.compare(model, reference, measure.hidden_states(model, tokens[:-1], cache), tokens, 128)


def test_the_reference_is_the_model_itself(model, tokens):
    with torch.inference_mode():
        own = model.base_model(torch.as_tensor(tokens[None, :-1]), use_cache=False).last_hidden_state[0]
    torch.testing.assert_close(measure.hidden_states(model, tokens[:-1], Kept()), own, rtol=1e-4, atol=1e-4)
    assert compared(model, tokens, Kept()).kld.max() < 1e-6


def test_wider_codes_lose_less(model, tokens):
    loss = [
        compared(model, tokens, Packed(f"kvarn_{kind}_g128", "weighted")).kld.mean()
        for kind in ("k8v8", "k4v4", "k2v2")
    ]
    assert 0 < loss[0] < loss[1] < loss[2]
    assert loss[0] < 1e-3


def test_the_first_tile_is_raw(model, tokens):
    """Rows of the first tile see raw tokens, which only the rounding to binary16 tells from the reference."""
    exact = measure.hidden_states(model, tokens[:-1], Kept())[:128]
    packed = measure.hidden_states(model, tokens[:-1], Packed("kvarn_k2v2_g128", "weighted"))[:128]
    torch.testing.assert_close(packed, exact, rtol=0.02, atol=0.02)


def test_the_model_gets_its_own_attention_back(model):
    before = model.config._attn_implementation
    with attending(model, Kept()):
        assert model.config._attn_implementation != before
    assert model.config._attn_implementation == before


def test_rows_of_the_table():
    rows = settings(64, 3, contexts=4, main="kvarn_k4v2_g128", main_contexts=8)
    names = [row.name for row in rows]
    assert len(names) == len(set(names)) == 3 + 2 * len(kvarn.presets())
    assert {row.contexts for row in rows if "k4v2" in row.name} == {8}
    with pytest.raises(ValueError, match="not a documented preset"):
        settings(64, 3, 4, "kvarn_k5v5_g128", 8)


def test_a_stopped_run_goes_on_where_it_was(model, tokens, tmp_path, monkeypatch):
    runner = Runner.__new__(Runner)
    runner.model, runner.tokens, runner.work, runner._common = (
        model,
        np.stack([tokens, tokens[::-1]]),
        tmp_path,
        "weights",
    )
    setting = Setting("k4v2", 3.5, Packed("kvarn_k4v2_g128", "weighted"), contexts=2)
    first = runner.run(setting)
    monkeypatch.setattr(measure, "hidden_states", lambda *_: pytest.fail("measured again"))
    again = runner.run(setting)
    assert (first.scores.kld == again.scores.kld).all()
    assert first.scores.kld.size == 2 * (LENGTH - 128)


def test_the_page_states_every_row_and_the_verdict():
    rough = np.random.default_rng(3).lognormal(size=128 * 8)
    parts = {"weighted": 0.4, "varnorm": 1.0}
    results = [
        Result(Setting(f"{preset} {encoder}", 3.5625, None, 4), scores(rough * part))
        for preset in kvarn.presets()
        for encoder, part in parts.items()
    ]
    facts = {
        "commit": "c",
        "model": "m",
        "layers": 30,
        "head_dim": 64,
        "kv_heads": 3,
        "text": "t",
        "main": "kvarn_k4v2_g128",
    }
    page = report.markdown(results, facts)
    for result in results:
        assert f"| {result.setting.name} |" in page
    assert "Reached: 0.40 [0.40, 0.40]" in page
