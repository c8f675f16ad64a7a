# SPDX-License-Identifier: Apache-2.0
"""kvarn eval layers: the choice on losses made up for it, the command on a random model."""

import json
import random
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

torch = pytest.importorskip("torch", reason="kvarn eval needs torch")
transformers = pytest.importorskip("transformers", reason="kvarn eval needs transformers")

from kvarn.cli.commands import app  # noqa: E402
from kvarn.eval import keys  # noqa: E402
from kvarn.eval.attention import Layer  # noqa: E402
from kvarn.eval.caches import Layered, Packed, Plain  # noqa: E402
from kvarn.eval.layers import choose  # noqa: E402
from kvarn.eval.rows import OWN_LAYERS  # noqa: E402
from llama import llama, save  # noqa: E402

BITS = {"small": 3.0, "middle": 3.5, "large": 4.0}


def losses(*layers):
    return {number: dict(zip(BITS, loss, strict=True)) for number, loss in enumerate(layers)}


@pytest.mark.parametrize(
    ("budget", "chosen"),
    [
        (3, "small small small"),
        (3.16, "small small small"),
        (3.17, "small middle small"),
        (3.34, "small large small"),
        (3.5, "middle large small"),
        (4, "middle large middle"),  # the last step of layers 0 and 2 saves nothing
    ],
)
def test_the_most_saved_for_a_bit(budget, chosen):
    found = losses((5, 3, 3), (9, 4, 1), (2, 1, 1.5))
    assert list(choose(found, BITS, budget).values()) == chosen.split()


def test_of_presets_alike_in_bytes_a_layer_begins_with_its_better_one():
    found = {0: {"a": 5, "b": 4, "c": 1}, 1: {"a": 3, "b": 6, "c": 2}}
    bits = {"a": 3.0, "b": 3.0, "c": 4.0}
    assert choose(found, bits, 3) == {0: "b", 1: "a"}
    assert choose(found, bits, 3.5) == {0: "c", 1: "a"}


def test_no_budget_is_exceeded():
    draw = random.Random(4)
    for _ in range(50):
        found = losses(*([draw.random() for _ in BITS] for _ in range(9)))
        budget = draw.uniform(3, 4)
        assert sum(BITS[name] for name in choose(found, BITS, budget).values()) <= 9 * budget
    with pytest.raises(ValueError, match="bits per value are too few: small alone has 3"):
        choose(found, BITS, 2.9)


def test_layers_have_their_own_caches():
    draw = torch.Generator().manual_seed(8)
    q, k, v = (torch.randn(300, heads, 64, generator=draw) for heads in (4, 2, 2))
    packed = Packed("kvarn_k4v2_g128", "weighted")
    layered = Layered({1: packed}, Plain())
    for number, cache in ((0, Plain()), (1, packed), (2, Plain())):
        assert torch.equal(layered(q, k, v, 0.1, Layer(number, 3)), cache(q, k, v, 0.1, Layer(number, 3)))
    assert repr(layered) != repr(Layered({2: packed}, Plain()))


@pytest.mark.parametrize("cache", [Packed("kvarn_k4v2_g128", "weighted"), Layered({}, Plain())])
def test_what_packs_is_known_by_the_core_that_packed_it(cache, monkeypatch):
    """Else a run of a new encoder takes the finished contexts of the old one for its own."""
    model = SimpleNamespace(weights="w", where="cpu float32", device=torch.device("cpu"))
    before = keys.key(model, cache)
    monkeypatch.setattr(keys, "_core", lambda: "another")
    assert keys.key(model, cache) != before


def test_the_command(tmp_path, monkeypatch):
    save(llama(11, layers=3, heads=4, kv_heads=2), tmp_path)
    monkeypatch.chdir(tmp_path)
    asked = "eval layers --model model --text text --length 300 --check 1 --work work --bits".split()

    def invoke(*arguments):
        return CliRunner().invoke(app, [*asked, *arguments])

    done = invoke("4", "--presets", "kvarn_k4v4_g128; kvarn_k2v2_g128")
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "layers.json").read_text())
    assert result["losses"].keys() == {"0", "1", "2"}
    assert [row["name"] for row in result["rows"]] == ["kvarn_k4v4_g128", "kvarn_k2v2_g128", OWN_LAYERS]
    least, most, own = result["rows"]
    assert least["mean"]["value"] < own["mean"]["value"] < most["mean"]["value"]
    assert own["bits_per_value"] <= 4
    assert set(result["kvarn_layers"].values()) == {"kvarn_k4v4_g128"} and result["kv_cache_dtype"] == "kvarn_k2v2_g128"
    option = done.output.split("--additional-config ")[1].split("\n")[0]
    assert json.loads(option.strip("'")) == {"kvarn_layers": result["kvarn_layers"]}
    again = "eval run --model model --text text --length 300 --contexts 2 --work work --rows kvarn_k2v2_g128*".split()
    done = CliRunner().invoke(app, [*again, "--layers", "layers.json"])
    assert done.exit_code == 0, done.output
    measured = json.loads((tmp_path / "eval.json").read_text())
    assert [row["name"] for row in measured["rows"]][-1] == OWN_LAYERS
    assert measured["rows"][-1]["bits_per_value"] == own["bits_per_value"]
    assert {pair["ours"] for pair in measured["pairs"]} > {OWN_LAYERS}
    done = CliRunner().invoke(app, ["eval", "report", "eval.json"])
    assert done.exit_code == 0 and OWN_LAYERS in (tmp_path / "eval.svg").read_text()
    done = CliRunner().invoke(app, [*again, "--layers", "eval.json"])
    assert done.exit_code == 1 and "eval.json is no result of kvarn eval layers" in done.stderr
    (tmp_path / "layers.json").write_text(json.dumps(result | {"kvarn_layers": {"7": "kvarn_k4v4_g128"}}))
    done = CliRunner().invoke(app, [*again, "--layers", "layers.json"])
    assert done.exit_code == 1 and "layers [7] have presets of their own; packed are [0, 1, 2]" in done.stderr
    failed = invoke("2")
    assert failed.exit_code == 1
    assert "2 bits per value are too few: kvarn_k4v2_g128 alone has" in failed.stderr
    assert "preset" in invoke("4", "--presets", "fp8").stderr
