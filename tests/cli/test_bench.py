# SPDX-License-Identifier: Apache-2.0
"""`kvarn bench serve`: mixes, shapes, the table and the picture; engines are stand-ins."""

import json
import time
import xml.etree.ElementTree as ElementTree
from types import SimpleNamespace

import pytest
from kvarn.bench import engine, picture, run, serve, shapes
from kvarn.bench.mix import Mix
from kvarn.cli import commands
from typer.testing import CliRunner

MIX = Mix(64, 2048, 48)
LINES = [
    {"kv_cache_dtype": "auto", "start_s": 24.0, "fit_tokens": 791312},
    {"kv_cache_dtype": "auto", "requests": 64, "context": 2048, "output": 48, "prefill_s": 3.3, "step_ms": 10.4},
    {"kv_cache_dtype": "kvarn_k4v2_g128", "start_s": 25.0, "fit_tokens": 3165248},
    {"kv_cache_dtype": "kvarn_k4v2_g128", "requests": 64, "context": 2048, "output": 48, "prefill_s": 3.0,
     "step_ms": 5.2},
    {"kv_cache_dtype": "fp8", "error": "not done after 3 s"},
]  # fmt: skip


@pytest.mark.parametrize(("text", "mix"), [
    ("64x2048+48", MIX), ("1x7+1", Mix(1, 7, 1)), ("4x1921-2048+128", Mix(4, 2048, 128, 1921)),
    ("8x32768:512+30", Mix(8, 32768, 30, new=512)), ("2x90-99:89+1", Mix(2, 99, 1, 90, 89)),
])  # fmt: skip
def test_a_mix(text, mix):
    assert Mix.of(text) == mix and text.startswith(f"{mix}+")


def test_the_prompts_of_a_mix():
    prompts = Mix(3, 99, 1, 90).prompts(50)
    assert [len(prompt) for prompt in prompts] == [90, 94, 99] and prompts == Mix(3, 99, 8, 90, 12).prompts(50)
    assert {token for prompt in prompts for token in prompt} <= set(range(2, 48))


@pytest.mark.parametrize("text", [
    "", "64x2048", "0x1+1", "x1+1", "1x2+3+4", "-1x2+3", "2x9-8+1", "2x0-8+1", "2x9:9+1", "2x9:0+1", "2x5-9:5+1",
])  # fmt: skip
def test_not_a_mix(text):
    with pytest.raises(ValueError, match=r"32x16384\+40"):
        Mix.of(text)


@pytest.mark.parametrize(("name", "dtype", "drafting"), [
    ("kvarn_k4v2_g128", "kvarn_k4v2_g128", {}),
    ("auto+suffix:4", "auto", {"method": "suffix", "num_speculative_tokens": 4}),
    ("fp8+ngram_gpu:12", "fp8", {"method": "ngram_gpu", "num_speculative_tokens": 12, "prompt_lookup_max": 3,
     "prompt_lookup_min": 1}),
])  # fmt: skip
def test_a_contender(name, dtype, drafting):
    assert engine.contender(name) == (dtype, drafting)


@pytest.mark.parametrize("name", ["", "+ngram:4", "fp8+ngram", "fp8+ngram:0", "fp8+ngram:4+ngram:4"])
def test_not_a_contender(name, tmp_path):
    with pytest.raises(ValueError, match=r"fp8\+ngram_gpu:4"):
        next(serve.measure("qwen3-8b", ["auto", name], [MIX], {}, serve.Limits(), tmp_path))


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_a_shape_is_a_configuration(tmp_path, name):
    folder, has_weights = shapes.folder_of(name, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    assert not has_weights and config["num_attention_heads"] % config["num_key_value_heads"] == 0


def test_a_model_that_is_neither(tmp_path):
    with pytest.raises(ValueError, match=r"neither a folder nor one of the shapes qwen3-8b"):
        shapes.folder_of("gpt-5", tmp_path)


def test_the_table():
    dtypes, rows = serve.table(LINES, [MIX])
    assert dtypes == ["auto", "kvarn_k4v2_g128", "fp8"]
    assert rows == [
        ["tokens that fit", "791,312", "3,165,248 (4.00x)", "-"],
        ["64x2048 prefill, s", "3.30", "3.00 (1.10x)", "-"],
        ["64x2048 step, ms", "10.40", "5.20 (2.00x)", "-"],
        ["start, caches as found, s", "24.00", "25.00 (0.96x)", "-"],
    ]


def test_the_table_of_a_mix_given_up_and_of_starts_again():
    lines = [*LINES, {"kv_cache_dtype": "fp8", "requests": 64, "context": 2048, "not_done_s": 60, "prefill_s": 6.6,
                      "step_ms": None}]  # fmt: skip
    lines += [{"kv_cache_dtype": "auto", "start_s": seconds, "restart": n} for n, seconds in ((1, 20.0), (2, 22.0))]
    lines += [{"kv_cache_dtype": "kvarn_k4v2_g128", "start_s": 21.0, "restart": n} for n in (1, 2)]
    _, rows = serve.table(lines, [MIX])
    assert rows[1:] == [
        ["64x2048 prefill, s", "3.30", "3.00 (1.10x)", "6.60 (0.50x)"],
        ["64x2048 step, ms", "10.40", "5.20 (2.00x)", "not done in 60 s"],
        ["start again, s", "21.00", "21.00 (1.00x)", "-"],
    ]


def test_the_table_of_prompts_of_several_lengths():
    mix = Mix(64, 2048, 128, 1921)
    about = {"requests": 64, "context": 2048, "output": 128, "least": 1921, "prefill_s": 3.0}
    lines = [*LINES, {"kv_cache_dtype": "auto", "step_ms": 10.4, "step_mean_ms": 10.5} | about]
    _, rows = serve.table(lines, [MIX, mix])
    assert [row[:2] for row in rows[1:6]] == [
        ["64x2048 prefill, s", "3.30"], ["64x2048 step, ms", "10.40"], ["64x1921-2048 prefill, s", "3.00"],
        ["64x1921-2048 step, ms", "10.40"], ["64x1921-2048 step, mean, ms", "10.50"],
    ]  # fmt: skip
    assert "ms per decode step, 64 x 1,921 to 2,048 tokens (less is better)" in picture.draw(lines, [mix])


def test_prompts_that_are_in_the_cache_but_for_their_ends():
    mix = Mix(64, 2048, 48, new=512)
    line = LINES[1] | {"new": 512, "prefill_s": 0.8}
    _, rows = serve.table([*LINES, line], [MIX, mix])
    assert [row[:2] for row in rows[1:5:2]] == [["64x2048 prefill, s", "3.30"], ["64x2048:512 prefill, s", "0.800"]]
    drawn = picture.draw([*LINES, line], [mix])
    assert "s to the first tokens, 64 x 2,048 tokens, the last 512 new (less is better)" in drawn and "0.80" in drawn


def test_the_picture():
    drawn = ElementTree.fromstring(picture.draw(LINES, [MIX]))
    texts = [node.text for node in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert {"3,165,248", "5.20", "ms per decode step, 64 x 2,048 tokens (less is better)"} <= set(texts)


@pytest.fixture
def measure(monkeypatch, tmp_path):
    """serve.measure, its engines run `program` in place of vLLM."""
    popen = serve.subprocess.Popen

    def run(program: str, seconds: int = 60, **more):
        path = tmp_path / "engine.py"
        path.write_text("import json, sys, time\nasked = json.loads(sys.argv[1])\n" + program)
        monkeypatch.setattr(
            serve.subprocess, "Popen", lambda command, **told: popen([command[0], str(path), command[-1]], **told)
        )
        dtypes, limits = ["auto", "fp8"], serve.Limits(seconds, 7)
        return serve.measure("qwen3-8b", dtypes, [MIX], {}, limits, tmp_path / "logs", **more)

    return run


def test_an_engine_that_dies_and_one_that_hangs(measure):
    lines = list(measure("print(json.dumps({'kv_cache_dtype': asked['kv_cache_dtype']})); raise SystemExit(3)"))
    assert lines[0] == {"kv_cache_dtype": "auto"} and "exit status 3" in lines[1]["error"] and len(lines) == 4
    assert "not done after 1 s" in next(measure("time.sleep(60)", seconds=1))["error"]
    said = list(measure("print(json.dumps({'error': 'why'})); raise SystemExit(1)"))
    assert said == [{"error": "why"}] * 2


def test_lines_come_and_are_kept_while_the_engine_runs(measure, tmp_path):
    path = tmp_path / "serve.jsonl"
    lines = serve.record(measure("print(json.dumps({'at': 1}), flush=True); time.sleep(60)"), "qwen3-8b", path)
    begun = time.monotonic()
    assert next(lines) == {"at": 1}
    written = json.loads(path.read_text())
    lines.close()
    assert written["at"] == 1 and written["model"] == "qwen3-8b" and time.monotonic() - begun < 30


def test_every_engine_starts_again_in_turns(measure):
    lines = list(measure("print(json.dumps({name: asked[name] for name in asked if name != 'model'}))", restarts=2))
    assert [(line["kv_cache_dtype"], len(line["mixes"]), line.get("restart")) for line in lines] == [
        ("auto", 1, None), ("fp8", 1, None), ("fp8", 0, 1), ("auto", 0, 1), ("auto", 0, 2), ("fp8", 0, 2),
    ]  # fmt: skip
    assert all(line["mix_seconds"] == 7 and line["dummy"] for line in lines)


class StandIn:
    """An engine whose steps take a while and give every request a token, and as many drafts as there are."""

    def __init__(self, seconds: float, drafts: int = 0):
        self.seconds, self.tokens, self.most, self.drafts = seconds, {}, 0, drafts
        self.vllm_config = SimpleNamespace(
            model_config=SimpleNamespace(get_vocab_size=lambda: 100),
            scheduler_config=SimpleNamespace(max_num_batched_tokens=1000),
            cache_config=SimpleNamespace(enable_prefix_caching=True),
            speculative_config=SimpleNamespace(num_speculative_tokens=drafts) if drafts else None,
        )

    def add_request(self, name, prompt, params):
        self.tokens[name], self.most = 0, params.max_tokens

    def reset_prefix_cache(self):
        pass

    def abort_request(self, names):
        self.tokens = {}

    def has_unfinished_requests(self) -> bool:
        return bool(self.tokens)

    def step(self):
        time.sleep(self.seconds)
        self.tokens = {name: min(count + 1 + self.drafts, self.most) for name, count in self.tokens.items()}
        said = [
            SimpleNamespace(
                request_id=name, finished=n == self.most, outputs=[SimpleNamespace(token_ids=[0] * n)],
                num_cached_tokens=6,
            )
            for name, n in self.tokens.items()
        ]  # fmt: skip
        self.tokens = {name: n for name, n in self.tokens.items() if n < self.most}
        return said


def test_a_mix_that_ends_and_one_that_is_given_up():
    pytest.importorskip("vllm")
    found = run.run_mix(SimpleNamespace(llm_engine=StandIn(0.0)), Mix(4, 10, 5), seconds=60)
    assert found["steps"] == 5 and "not_done_s" not in found
    slow = StandIn(0.02)
    found = run.run_mix(SimpleNamespace(llm_engine=slow), Mix(4, 10, 500), seconds=0.2)
    assert found["not_done_s"] == 0.2 and 0 < found["steps"] < 500 and found["prefill_s"] > 0
    assert "total_s" not in found and not slow.has_unfinished_requests()


def test_what_a_step_with_drafts_gains():
    pytest.importorskip("vllm")
    found = run.run_mix(SimpleNamespace(llm_engine=StandIn(0.0, drafts=2)), Mix(4, 10, 5))
    assert found["step_tokens"] == 3.0
    found = run.run_mix(SimpleNamespace(llm_engine=StandIn(0.0)), Mix(4, 10, 5, new=3))
    assert found["step_tokens"] == 1.0 and found["hit_tokens"] == 6


def test_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr(serve, "measure", lambda *_: iter(LINES))
    results = tmp_path / "out" / "serve.jsonl"
    asked = ["bench", "serve", "qwen3-8b", "--mixes", "64x2048+48", "--results", str(results)]
    ran = CliRunner().invoke(commands.app, asked)
    assert ran.exit_code == 1 and "fp8: not done after 3 s" in ran.output and "(4.00x)" in ran.output
    assert results.with_suffix(".svg").exists() and len(results.read_text().splitlines()) == len(LINES)
    bad = CliRunner().invoke(commands.app, ["bench", "serve", "qwen3-8b", "--mixes", "many"])
    assert bad.exit_code == 1 and "is not a mix" in bad.output
