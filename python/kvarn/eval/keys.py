# SPDX-License-Identifier: Apache-2.0
"""What is done already: files named by digests of all that a result depends on, so that nothing old is reused."""

import ast
import hashlib
import os
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import kvarn
import kvarn._core
import kvarn.energy
import kvarn.eval.attention
import kvarn.rivals.rounding
from kvarn.eval.caches import Layered, Packed, Simulated
from kvarn.eval.model import Model, digest


def key(model: Model, cache, *parts: str) -> str:
    """32 hexadecimal digits that tell this cache of this model, and `parts`, from any other."""
    told = (model.weights, model.where, repr(cache), _code(cache, model.device.type), *parts)
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:32]


def save(path: Path, write: Callable[[Path], object]) -> None:
    """`write` makes the file; it appears by one rename, also where several runs share a folder."""
    partial = path.with_stem(f"{path.stem}.{os.getpid()}")
    write(partial)
    partial.replace(path)


def _code(cache, device: str) -> str:
    """What `cache` computes with: the compiled core and its target, or the files of a simulation."""
    modules = [kvarn.energy.__name__, kvarn.eval.attention.__name__, type(cache).__module__]
    if isinstance(cache, Packed | Layered):
        return _core() + (kvarn.target() if device == "cpu" else device) + "".join(map(meaning, modules))
    if isinstance(cache, Simulated):
        modules += [type(cache.rival).__module__, kvarn.rivals.rounding.__name__]
    return "".join(map(meaning, modules))


@lru_cache
def _core() -> str:
    """Of the compiled module: some 20 MB, and every question and every context asks."""
    return digest(Path(kvarn._core.__file__))


@lru_cache
def meaning(module: str) -> str:
    """A digest of a module's source without comments, layout and docstrings: to reword them costs no new run."""
    tree = ast.parse(Path(sys.modules[module].__file__).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(body := getattr(node, "body", None), list):
            node.body = [line for line in body if not _is_text(line)]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def _is_text(line: ast.stmt) -> bool:
    return isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant)
