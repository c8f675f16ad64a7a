# SPDX-License-Identifier: Apache-2.0
"""The names that we hook into, in the releases at both ends of what we support and in the installed one."""

import copy
import importlib
import json
from pathlib import Path

import pytest
from kvarn.vllm import PRESETS, compat, contract, hooks, source

CONTRACT = json.loads(Path(__file__).with_name("contract.json").read_text())
ALTERNATIVES = {
    "0.26.0": {
        "cache dtype": "CacheDType literal",
        "page size": "real_page_size_bytes",
        "cache view": "get_kv_cache_shape",
    },
    "0.33.0": {
        "cache dtype": "register_kv_cache_dtype",
        "page size": "head slots of bytes",
        "cache view": "from the spec",
    },
}


def probe(known: dict) -> list[contract.Hook]:
    return contract.judge(lambda module: known["names"].get(module, {}))


@pytest.mark.parametrize("version", CONTRACT)
def test_release_has_every_hook(version):
    found = {hook.name: hook for hook in probe(CONTRACT[version])}
    assert [hook for hook in found.values() if not hook.found] == []
    for name, detail in ALTERNATIVES[version].items():
        assert found[name].detail == detail


def test_model_runner_2_takes_the_row_width_from_the_spec_since_0_29():
    assert {version: entry["runner_2_asks_spec"] for version, entry in CONTRACT.items()} == {
        "0.26.0": False,
        "0.33.0": True,
    }


@pytest.mark.parametrize("version", CONTRACT)
def test_each_name_counts(version):
    """Without any one of the names that its alternative needs, a hook is missing or falls back to another."""
    for hook in probe(CONTRACT[version]):
        needed = contract.HOOKS[hook.name][hook.detail]
        for name in needed:
            poorer = copy.deepcopy(CONTRACT[version])
            module = poorer["names"][name.module]
            member = name.name.rpartition(".")[2]
            for defined in [d for d in module if d.rpartition(".")[2] == member]:  # in base classes too
                del module[defined]
            changed = {h.name: h for h in probe(poorer)}[hook.name]
            assert not changed.found or changed.detail != hook.detail, name


def test_installed_vllm_has_every_hook():
    assert [hook for hook in contract.probe() if not hook.found] == []


def test_what_the_sources_say_is_there_when_imported():
    for alternatives in contract.HOOKS.values():
        for words, names in alternatives.items():
            if all(_in_sources(name) for name in names):
                for name in names:
                    assert _importable(name), (words, name)
                break


def test_registering_again_changes_nothing():
    import vllm.config.cache
    from vllm.platforms import current_platform

    compat.install(PRESETS, hooks)
    before = vars(type(current_platform)).copy()
    compat.install(PRESETS, hooks)
    assert vars(type(current_platform)) == before
    known = vllm.config.cache.CacheDType.__args__
    assert set(PRESETS) <= set(known) and len(known) == len(set(known))


def test_source_reads_classes_functions_and_fields(tmp_path):
    package = tmp_path / "some"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "thing.py").write_text(
        "import nothing_that_exists\nNAME = 1\nclass A:\n    field: int\n    def go(self, x, *, y=1, **z): ...\n"
        "class B(A):\n    @property\n    def size(self): ...\n"
    )
    names = source.names_of(tmp_path, "some.thing")
    assert names == {
        "NAME": None,
        "A": [],
        "A.field": None,
        "A.go": ["self", "x", "y", "*z"],
        "B": ["A"],
        "B.size": ["self"],
    }
    assert source.lookup(names, "B.go") == ["self", "x", "y", "*z"]
    assert source.names_of(tmp_path, "some.other") is None
    assert source.mentions(tmp_path, "some.thing", "nothing_that_exists")
    with pytest.raises(KeyError):
        source.lookup(names, "B.absent")


def _in_sources(name: contract.Name) -> bool:
    try:
        source.lookup(source.names_of(contract.installed_root(), name.module) or {}, name.name)
    except KeyError:
        return False
    return True


def _importable(name: contract.Name) -> bool:
    found = importlib.import_module(name.module)
    for part in name.name.split("."):
        if part in getattr(found, "__dataclass_fields__", {}) or part in getattr(found, "_fields", ()):
            return True
        found = getattr(found, part)
    return True
