# SPDX-License-Identifier: Apache-2.0
"""kvarn eval ask: the rules of its tasks, its caches against those of one pass, the command on a random model."""

import copy
import gzip
import json
from itertools import pairwise

import numpy as np
import pytest
from typer.testing import CliRunner

torch = pytest.importorskip("torch", reason="kvarn eval needs torch")
transformers = pytest.importorskip("transformers", reason="kvarn eval needs transformers")

from kvarn.cli.commands import app  # noqa: E402
from kvarn.eval import generation, measure, statistics, tasks  # noqa: E402
from kvarn.eval.caches import Layered, Packed, Plain, Simulated  # noqa: E402
from kvarn.rivals import RIVALS, Recent  # noqa: E402
from llama import llama  # noqa: E402

LENGTH = 200


@pytest.fixture(scope="module")
def net():
    return llama(7, layers=5, heads=2, kv_heads=1, eos_token_id=1)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The <REGISTER_CONTENT> in line a-b is <2416>.", "2416"),
        ("1,234,567 dollars", "1234567"),
        ("first 3, then -4.50", "-4.5"),
        ("18.00", "18"),
        ("none", None),
    ],
)
def test_last_number(text, number):
    assert tasks.last_number(text) == number


@pytest.fixture
def data(tmp_path):
    """One or two questions of each task, in their sources' formats."""
    folder = tmp_path / "data"
    for name in ("longctx", "math"):
        (folder / name).mkdir(parents=True)
    for count in (200, 300):
        lines = [{"prompt": f"{count} {i} line", "expected_number": 7 + i, "correct_line": ""} for i in range(2)]
        (folder / f"longctx/longeval_lines_{count}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    keys = {"ordered_kv_records": [["a1", "b1"], ["a2", "B2"]], "key": "a2", "value": "B2"}
    with gzip.open(folder / "longctx/kv-retrieval-75_keys.jsonl.gz", "wt") as file:
        file.write(json.dumps(keys))
    passkey = {"input": "grass. ", "target": "74509", "passkey_position": 1}
    (folder / "longctx/kivi_passkey_examples.jsonl").write_text(json.dumps(passkey))
    (folder / "math/gsm8k_test.jsonl").write_text(json.dumps({"question": "6 x 3?", "answer": "6 x 3\n#### 1,018"}))
    return folder


def test_tasks_and_their_rules(data):
    lines, _, keys, passkey, gsm8k = tasks.tasks(data, list(tasks.NAMES), 1)
    assert [len(task.questions) for task in (lines, keys, passkey, gsm8k)] == [1] * 4
    assert lines.questions[0].answer == "7"
    assert lines.correct("line 3 has 7", "7") and not lines.correct("7, no: 8", "7") and not lines.correct("", "7")
    assert keys.questions[0].prompt.endswith('{"a1": "b1",\n "a2": "B2"}\n\nKey: "a2"\nCorresponding value:')
    assert keys.correct('It is "b2".', "B2") and not keys.correct("b1", "B2")
    uuid = "3f7e0a52-9c41-4d8b-a6f0-5b1c2d9e8a73"
    assert keys.new_tokens >= 2 * len(uuid) + 64  # the key and its value, a token per character, and words around
    assert passkey.questions[0].prompt == "grass. What is the pass key? The pass key is "
    assert gsm8k.questions[0].answer == "1018"
    assert gsm8k.correct("so \\boxed{\\$1,018.0} of 5", "1018") and gsm8k.correct("It is 1018", "1018")
    assert not gsm8k.correct("\\boxed{5}, not 1018", "1018")
    with pytest.raises(ValueError, match=r"no task is called 'lines'.*lines_200"):
        tasks.tasks(data, ["lines"])
    with pytest.raises(FileNotFoundError, match="--data"):
        tasks.tasks(data / "math", ["gsm8k"])


def test_percent_and_its_interval():
    half = statistics.percent(np.arange(400) % 2)
    assert half.value == 50 and 44 < half.low < 46 and 54 < half.high < 56
    assert statistics.percent(np.ones(9)) == statistics.Estimate(100, 100, 100)


SMALL, LARGE = (Packed(f"kvarn_{kind}_g128", "varnorm") for kind in ("k4v2", "k4v4"))
GENERATED = [Plain(torch.bfloat16), SMALL, Layered({1: LARGE}, SMALL)] + [
    Simulated(rival, Recent.NONE) for rival in RIVALS.values() if rival.by_token
]


@pytest.mark.parametrize("cache", GENERATED, ids=repr)
def test_single_steps_are_what_one_pass_computes(net, cache):
    """Errors accumulate alike in generation and in kvarn eval run: the two differ by the order of sums."""
    tokens = np.random.default_rng(8).integers(2, 97, LENGTH + 1)
    stepping = copy.deepcopy(net)
    made = generation.make_cache(cache, stepping.config)
    ids = torch.as_tensor(tokens[None, :LENGTH])
    cuts = [0, 90, 91, 92, *range(120, LENGTH), LENGTH]
    with torch.inference_mode():
        steps = [
            stepping.base_model(ids[:, first:end], past_key_values=made).last_hidden_state[0]
            for first, end in pairwise(cuts)
        ]
    whole = measure.hidden_states(net, tokens[:-1], cache)
    exact = measure.hidden_states(net, tokens[:-1], Plain())
    # Now and then a sum in another order rounds a code the other way.
    assert (torch.cat(steps) - whole).norm() < 0.1 * (whole - exact).norm()


@pytest.mark.parametrize("name", ["KIVI-4", "fp8, calibrated"])
def test_formats_that_look_at_other_tokens_are_refused(net, name):
    cache = Simulated(RIVALS[name], RIVALS[name].recent)
    assert not generation.can_generate(cache)
    with pytest.raises(NotImplementedError, match="each token as it comes"):
        generation.make_cache(cache, net.config)


def test_command(net, data, tmp_path, monkeypatch):
    """Ask, go on, report. One token per character; prompts of different lengths are one batch."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = {chr(code): code - 30 for code in range(32, 127)}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token=" "))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    uneven = copy.deepcopy(net)  # keys of which balance has something to divide
    for layer in uneven.model.layers:
        layer.self_attn.k_proj.weight.data[::8] *= 16
    uneven.save_pretrained(tmp_path / "model")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="~", unk_token=" ")
    fast.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    asked = ["eval", "ask", "--model", "model", "--data", "data", "--task", "lines_200;passkey", "--work", "work"]

    def invoke(*arguments):
        done = CliRunner().invoke(app, [*asked, *arguments])
        assert done.exit_code == 0, done.output
        return json.loads((tmp_path / "answers.json").read_text()), {
            path.name: (path.stat().st_mtime_ns, json.loads(path.read_text())["text"])
            for path in (tmp_path / "work").iterdir()
        }

    first, kept = invoke("--rows", "kvarn_k4v2_g128 weighted", "--batch", "2")
    assert len(kept) == 2 * 3
    second, more = invoke("--rows", "kvarn_k4v2_g128 *;q4_0*;KIVI-4")
    assert kept.items() < more.items() and len(more) == 7 * 3
    assert [row["name"] for row in first["rows"]] == ["bf16", "kvarn_k4v2_g128 weighted"]
    assert [row["name"] for row in second["rows"]][1:] == [
        *(f"kvarn_k4v2_g128 {encoder}" for encoder in ("weighted", "varnorm", "feedback", "fit")),
        "q4_0", "q4_0, not rotated",
    ]  # fmt: skip
    assert second["rows"][0]["tasks"]["lines_200"]["difference_percent"] == {"value": 0, "low": 0, "high": 0}
    done = CliRunner().invoke(app, ["eval", "report", "answers.json"])
    assert done.exit_code == 0, done.output
    page = (tmp_path / "eval.md").read_text()
    assert "**model, lines_200** (LongEval" in page and "| **kvarn_k4v2_g128 weighted** | 3.562 |" in page
    assert not (tmp_path / "eval.svg").exists()
    failed = CliRunner().invoke(app, [*asked, "--task", "lines"])
    assert failed.exit_code == 1 and "no task is called" in failed.stderr


def test_an_answer_does_not_depend_on_its_batch(net):
    """Padding beside a longer prompt changes nothing."""
    from types import SimpleNamespace

    class Numbers:
        chat_template, pad_token, pad_token_id, eos_token, eos_token_id = None, "0", 0, "1", 1

        def __call__(self, texts, **_):
            ids = [[int(word) for word in text.split()] for text in texts]
            width = max(map(len, ids))
            padded = torch.tensor([[0] * (width - len(row)) + row for row in ids])
            return {"input_ids": padded, "attention_mask": (padded > 0).long()}

        def decode(self, tokens, **_):
            return " ".join(map(str, tokens))

    draw = np.random.default_rng(9)
    prompts = [" ".join(map(str, draw.integers(2, 97, count))) for count in (40, 150, 3)]
    model = SimpleNamespace(net=copy.deepcopy(net), tokenizer=Numbers(), device=net.device)
    for cache in (Plain(torch.bfloat16), Packed("kvarn_k4v2_g128", "weighted"), Simulated(RIVALS["q4_0"], Recent.NONE)):
        together = generation.answers(model, cache, prompts, 12)
        alone = [generation.answers(model, cache, [prompt], 12)[0] for prompt in prompts]
        assert together == alone
        assert all(tokens <= 12 for _, tokens in together)
