# SPDX-License-Identifier: Apache-2.0
"""kvarn eval: its statistics on numbers made up for it, its caches and its commands on a small random model."""

import copy
import json
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
from typer.testing import CliRunner

torch = pytest.importorskip("torch", reason="kvarn eval needs torch")
transformers = pytest.importorskip("transformers", reason="kvarn eval needs transformers")

import kvarn  # noqa: E402
from kvarn.cli.commands import app  # noqa: E402
from kvarn.energy import Seen  # noqa: E402
from kvarn.eval import measure, picture, report, results, statistics, text  # noqa: E402
from kvarn.eval.attention import Layer, Past, attending, exact, window_mask  # noqa: E402
from kvarn.eval.caches import Packed, Plain, Simulated  # noqa: E402
from kvarn.eval.measure import Scores  # noqa: E402
from kvarn.eval.rows import OWN_LAYERS, Row, rows  # noqa: E402
from kvarn.eval.run import Runner  # noqa: E402
from kvarn.rivals import RIVALS, Recent  # noqa: E402
from llama import llama, save  # noqa: E402


def scores(kld, nll=None, reference_nll=None, same_top=None):
    """Of one context, or of several where the arrays have two axes."""
    given = kld, nll, reference_nll, same_top
    kld, nll, reference_nll, same_top = (x if x is None else np.atleast_2d(x) for x in given)
    kld = kld.astype(np.float32)
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
    assert (row.tokens, row.mean.value, row.median.value) == (1000, 499.5, 499.5)
    assert row.mean.low < 499.5 < row.mean.high
    assert row.trimmed == np.arange(990).mean()
    assert row.p99 == pytest.approx(989.01)
    assert row.same_top_percent.value == 25


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


def test_contexts_that_differ_widen_the_interval():
    noise = np.random.default_rng(4).normal(0, 0.1, (6, 128 * 15))
    alike = statistics.summary(scores(5 + noise)).mean
    apart = statistics.summary(scores(5 + noise + np.arange(6)[:, None])).mean
    assert (alike.high - alike.low) < 0.03
    assert 1 < apart.high - apart.low < 4


def test_less_than_a_block_is_an_error():
    with pytest.raises(ValueError, match="at least one block"):
        statistics.summary(scores(np.ones(127)))


class Words:
    """A tokenizer of one token per word; every text begins with the tokens `begin`."""

    def __init__(self, *begin: int):
        self.begin = begin

    def __call__(self, text):
        return {"input_ids": [*self.begin, *(int(word) for word in text.split())]}


def test_contexts_are_apart_and_stay_when_more_are_asked(tmp_path):
    path = tmp_path / "text"
    path.write_text(" ".join(map(str, range(40_000))))
    two, three = (text.contexts(path, Words(), count, 100) for count in (2, 3))
    assert two.shape == (2, 101)
    assert (three[:2] == two).all()
    assert (three[:, 0] == np.arange(3) * text.SPACING).all()
    assert text.contexts(path, Words(), 300, 100).shape == (300, 101)
    begun = text.contexts(path, Words(7), 3, 100)
    assert (begun[:, 0] == 7).all()
    assert (begun[:, 1:] == three[:, :-1]).all()
    with pytest.raises(ValueError, match="too few for 400 contexts"):
        text.contexts(path, Words(), 400, 100)
    with pytest.raises(FileNotFoundError, match="--text"):
        text.contexts(tmp_path / "other", Words(), 1, 100)


LENGTH = 300


@pytest.fixture(scope="module")
def model():
    return llama(5, layers=2, heads=4, kv_heads=2)


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(6).integers(0, 97, LENGTH + 1)


def compared(model, tokens, cache, past=Past.DECODED):
    reference = measure.hidden_states(model, tokens[:-1], Plain())
    return measure.compare(model, reference, measure.hidden_states(model, tokens[:-1], cache, past), tokens, 128)


def test_the_reference_is_the_model_itself(model, tokens):
    with torch.inference_mode():
        own = model.base_model(torch.as_tensor(tokens[None, :-1]), use_cache=False).last_hidden_state[0]
    torch.testing.assert_close(measure.hidden_states(model, tokens[:-1], Plain()), own, rtol=1e-4, atol=1e-4)
    assert compared(model, tokens, Plain()).kld.max() < 1e-6


def test_wider_codes_lose_less(model, tokens):
    loss = [
        compared(model, tokens, Packed(f"kvarn_{kind}_g128", "weighted")).kld.mean()
        for kind in ("k8v8", "k4v4", "k2v2")
    ]
    assert 0 < loss[0] < loss[1] < loss[2]
    assert loss[0] < 1e-3


@pytest.mark.parametrize("past", Past)
def test_without_rounding_both_pasts_are_the_model_itself(model, tokens, past):
    assert compared(model, tokens, Plain(), past).kld.max() < 1e-6


def test_the_first_layer_knows_no_accumulation(model, tokens):
    """Its keys and values come from the embeddings alone: a model of one layer is the same with either past."""
    cache = Packed("kvarn_k2v2_g128", "weighted")
    first = transformers.LlamaForCausalLM(transformers.LlamaConfig(**model.config.to_dict() | {"num_hidden_layers": 1}))
    first.load_state_dict(model.state_dict(), strict=False)
    decoded, prompt = (measure.hidden_states(first.eval(), tokens[:-1], cache, past) for past in Past)
    torch.testing.assert_close(decoded, prompt, rtol=1e-4, atol=1e-4)
    decoded, prompt = (measure.hidden_states(model, tokens[:-1], cache, past) for past in Past)
    assert not torch.allclose(decoded, prompt, rtol=1e-2, atol=1e-2)


def test_a_decoded_past_is_what_single_steps_leave(model, tokens):
    """Pseudo-decode: token by token through the cache of kvarn.hf, and one pass here, are the same but for the order of
    sums."""
    cache = kvarn.hf.Cache(copy.deepcopy(model.config), "kvarn_k4v2_g128")
    stepping = copy.deepcopy(model)
    stepping.set_attn_implementation("kvarn")
    with torch.inference_mode():
        steps = [
            stepping.base_model(torch.as_tensor(tokens[None, i : i + 1]), past_key_values=cache).last_hidden_state[0]
            for i in range(LENGTH)
        ]
    whole = measure.hidden_states(model, tokens[:-1], Packed("kvarn_k4v2_g128", "weighted"))
    # A sum in another order may round a code the other way: hardly any element may show it.
    far = ~torch.isclose(torch.cat(steps), whole, rtol=1e-2, atol=1e-2)
    assert far.float().mean() < 0.01


def test_the_first_tile_is_raw(model, tokens):
    """Rows of the first tile see raw tokens, which only the rounding to binary16 tells from the reference."""
    exact = measure.hidden_states(model, tokens[:-1], Plain())[:128]
    packed = measure.hidden_states(model, tokens[:-1], Packed("kvarn_k2v2_g128", "weighted"))[:128]
    torch.testing.assert_close(packed, exact, rtol=0.02, atol=0.02)


def test_the_model_gets_its_own_attention_back(model):
    before = model.config._attn_implementation
    with attending(model, Plain()):
        assert model.config._attn_implementation != before
    assert model.config._attn_implementation == before


def reference_attention(q, k, v, scale, raw_k, raw_v, packed_k, packed_v):
    """Row by row, by the definition: raw_k and raw_v say from which token on a row reads raw."""
    out = torch.empty_like(q)
    for t in range(len(q)):
        keys = torch.cat([packed_k[: raw_k(t)], k[raw_k(t) : t + 1]])
        values = torch.cat([packed_v[: raw_v(t)], v[raw_v(t) : t + 1]])
        for head in range(q.shape[1]):
            of = head // (q.shape[1] // k.shape[1])
            out[t, head] = (keys[:, of] @ q[t, head] * scale).softmax(0) @ values[:, of]
    return out


@pytest.mark.parametrize("recent", Recent)
def test_recent_tokens_are_read_raw(recent):
    draw = torch.Generator().manual_seed(8)
    q, k, v = (torch.randn(300, heads, 64, generator=draw) for heads in (4, 2, 2))
    rival = RIVALS["KIVI-2"]
    raw_k = {Recent.NONE: lambda t: t + 1}.get(recent, lambda t: t - t % 128)
    raw_v = raw_k if recent is not Recent.KIVI else lambda t: max(0, t - 128)
    expected = reference_attention(q, k, v, 0.1, raw_k, raw_v, rival.keys(k), rival.values(v))
    torch.testing.assert_close(Simulated(rival, recent)(q, k, v, 0.1, Layer(0, 3)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", RIVALS)
def test_simulations_stay_on_the_device_of_their_tensors(name):
    """torch's meta device computes nothing, but refuses to mix devices as a GPU does."""
    q, k, v = (torch.empty(300, heads, 128, device="meta") for heads in (4, 2, 2))
    for recent in Recent:
        assert Simulated(RIVALS[name], recent)(q, k, v, 0.1, Layer(3, 9)).device.type == "meta"


@pytest.mark.gpu
@pytest.mark.parametrize(
    "cache", [Packed("kvarn_k4v2_g128", "weighted"), *(Simulated(r, r.recent) for r in RIVALS.values())]
)
def test_caches_on_a_gpu(cache):
    if missing := kvarn.cuda_missing():
        pytest.skip(missing)
    draw = torch.Generator().manual_seed(10)
    q, k, v = (torch.randn(700, heads, 128, generator=draw) for heads in (4, 2, 2))
    there = cache(*(x.cuda() for x in (q, k, v)), 0.1, Layer(3, 9)).cpu()
    here = cache(q, k, v, 0.1, Layer(3, 9))
    assert (there - here).norm() < 0.01 * here.norm()


def test_boundary_layers_of_turboquant_are_exact():
    q, k, v = (torch.randn(40, 2, 64, generator=torch.Generator().manual_seed(9)) for _ in range(3))
    cache = Simulated(RIVALS["turboquant_3bit_nc"], Recent.NONE)
    assert torch.equal(cache(q, k, v, 0.1, Layer(1, 6)), exact(q, k, v, 0.1))
    assert not torch.allclose(cache(q, k, v, 0.1, Layer(2, 6)), exact(q, k, v, 0.1))


def test_window_of_two_tokens():
    assert window_mask(4, 2).int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]


def test_rows_have_names_of_their_own_and_are_chosen_by_pattern():
    every = rows(64, 3, range(30), 30)
    names = [row.name for row in every]
    assert len(names) == len(set(names))
    assert {f"{preset} {encoder}" for preset in kvarn.presets() for encoder in ("weighted", "varnorm")} < set(names)
    assert set(RIVALS) < set(names)
    compared = {name for pair in results.pairs() for name in pair if not name.startswith("KIVI")} - {OWN_LAYERS}
    assert compared < {row.name for row in rows(64, 3, range(30), 30, feedback=lambda balanced: {})}
    assert [row.name for row in rows(64, 3, range(30), 30, "q8_0; kvarn_k4v2* weighted")] == [
        "kvarn_k4v2_g128 weighted",
        "q8_0",
    ]
    made = {balanced: {0: Seen(torch.ones(3, 64), torch.ones(3, 64))} for balanced in (True, False)}
    fed = {row.name: row.cache for row in rows(64, 3, range(30), 30, "kvarn_k4v2_g128 *", made.get)}
    for encoder, feedback in {"weighted": made[True], "feedback": made[False], "varnorm": None, "fit": None}.items():
        assert fed[f"kvarn_k4v2_g128 {encoder}"].feedback is feedback
    assert len(set(map(repr, fed.values()))) == 3, "these two are the same but for their names"
    without = rows(64, 3, range(30), 30, "q8_0; kvarn_* fit; kvarn_* varnorm", lambda _: pytest.fail("made for no row"))
    assert {row.name for row in without} >= {"q8_0", "kvarn_k4v2_g128 fit"}
    with pytest.raises(ValueError, match=r"no row is called 'q3_0'.*q4_0"):
        rows(64, 3, range(30), 30, "q3_0")


def test_a_stopped_run_goes_on_where_it_was(model, tokens, tmp_path, monkeypatch):
    runner = Runner.__new__(Runner)
    runner.model = SimpleNamespace(net=model, device=model.device, weights="weights", where="cpu")
    runner.past, runner.work = Past.DECODED, tmp_path
    runner.tokens = np.stack([tokens, tokens[::-1]])
    cache = Simulated(RIVALS["q4_0"], Recent.TILE)
    first = runner.run(cache)
    monkeypatch.setattr(measure, "hidden_states", lambda *_: pytest.fail("measured again"))
    assert (first.kld == runner.run(cache).kld).all()
    assert first.kld.size == 2 * (LENGTH - 128)
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        runner.run(Simulated(RIVALS["q4_0"], Recent.NONE))


def made_up(parts):
    rough = np.random.default_rng(3).lognormal(size=128 * 8)
    facts = {"commit": "c", "model": "m & n", "layers": 30, "packed_layers": 30, "head_dim": 64, "kv_heads": 3}
    result = results.Result(facts | {"text": "t", "context": 2048})
    for name, kind, bits, part in parts:
        result.add(Row(name, kind, bits, "tile", None), scores(rough * part))
    return result.describe()


def test_report_has_every_row_and_the_ratios(tmp_path):
    result = made_up(
        [
            ("kvarn_k4v2_g128 weighted", "kvarn", 3.56, 0.4),
            ("kvarn_k4v2_g128 varnorm", "kvarn", 3.56, 1),
            ("q", "rival", 4, 2),
        ]
    )
    results.write(result, path := tmp_path / "run.json")
    page = report.markdown(results.read(path))
    assert "; perplexity " in page and " without a cache; " in page
    assert "| q | 4 |" in page and "| **kvarn_k4v2_g128 weighted** | 3.56 |" in page
    assert "| kvarn_k4v2_g128 weighted | kvarn_k4v2_g128 varnorm | 0.40 [0.40, 0.40] | 0.40 [0.40, 0.40] |" in page
    svg = ElementTree.fromstring(picture.draw([result, {**result, "context": 8192}]))
    assert len(svg.findall("{*}circle")) == 6
    assert len(ElementTree.fromstring(picture.draw([result], "*varnorm; q")).findall("{*}circle")) == 2
    with pytest.raises(ValueError, match="no row below"):
        picture.draw([made_up([("bf16", "16-bit", 16, 1)])])


def test_runs_of_one_model_and_length_share_a_panel():
    ours, both, longer = (
        made_up([(name, "rival", 4, part) for name, part in parts])
        for parts in ([("q", 2)], [("q", 1), ("p", 3)], [("p", 3)])
    )
    svg = ElementTree.fromstring(picture.draw([ours, both, {**longer, "context": 8192}]))
    assert [text.text for text in svg.findall("{*}text") if text.text in ("p", "q")] == ["q", "p", "p"]
    assert len(ours["rows"]) == 1


def test_names_in_the_picture_cover_neither_each_other_nor_points():
    points = [(300.0, 200.0 + 3 * number) for number in range(12)]
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in points]
    for x, y in points:
        taken.append(picture._place(x, y, 90, False, taken, (0, 100, 860, 400)))
    names = taken[len(points) :]
    for number, name in enumerate(names):
        assert 0 <= name[0] and name[2] <= 860 and 100 <= name[1] and name[3] <= 400
        others = taken[: len(points)] + names[:number]
        assert not any(a[0] < name[2] and name[0] < a[2] and a[1] < name[3] and name[1] < a[3] for a in others)


def test_commands(model, tmp_path, monkeypatch):
    """Run, go on, report: on a random model with a tokenizer of one token per word."""
    save(model, tmp_path)
    monkeypatch.chdir(tmp_path)
    asked = [
        "eval",
        "run",
        "--model",
        "model",
        "--text",
        "text",
        "--contexts",
        "2",
        "--length",
        "300",
        "--work",
        "work",
    ]

    def invoke(*arguments):
        return CliRunner().invoke(app, list(arguments))

    done = invoke(*asked, "--rows", "kvarn_k4v2_g128*;q4_0*")
    assert done.exit_code == 0, done.output
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").iterdir()}
    assert invoke(*asked, "--rows", "kvarn_k4v2_g128 *;q4_0*;bf16").exit_code == 0
    assert kept.items() < {path: path.stat().st_mtime_ns for path in (tmp_path / "work").iterdir()}.items()
    result = json.loads((tmp_path / "eval.json").read_text())
    assert [row["name"] for row in result["rows"]][:2] == ["bf16", "kvarn_k4v2_g128 weighted"]
    assert {(pair["ours"], pair["other"]) for pair in result["pairs"]} >= {
        ("kvarn_k4v2_g128 weighted", "kvarn_k4v2_g128 varnorm")
    }
    assert invoke("eval", "report", "eval.json").exit_code == 0
    assert "q4_0" in (tmp_path / "eval.md").read_text() and "q4_0" in (tmp_path / "eval.svg").read_text()
    for wrong, said in (
        (["eval", "run", "--model", "nowhere"], "no model at nowhere"),
        ([*asked, "--rows", "q3_0"], "no row is called"),
        ([*asked, "--past", "future"], "must be one of decoded, prompt"),
        ([*asked, "--dtype", "int3"], "must be one of float32"),
        ([*asked, "--device", "tpu"], "must be cpu or cuda"),
        (["eval", "report", "text"], "not JSON"),
        (["eval", "report", "model/config.json"], "no result of kvarn eval run"),
    ):
        failed = invoke(*wrong)
        assert failed.exit_code == 1
        assert said in failed.stderr
