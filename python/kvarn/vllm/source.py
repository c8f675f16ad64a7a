# SPDX-License-Identifier: Apache-2.0
"""What names a Python source tree defines, read from its text: nothing is imported, nothing runs."""

import ast
from pathlib import Path

# qualified name -> parameter names of a function, base names of a class, None for any other name
Names = dict[str, list[str] | None]


def names_of(root: Path, module: str) -> Names | None:
    """The names that `module` defines at its top level and in its classes, or None if there is no such module.

    root    the folder that holds the top-level package
    module  dotted
    """
    path = root.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if not path.is_file():
        return None
    names: Names = {}
    _collect(ast.parse(path.read_text(encoding="utf-8")).body, "", names)
    return names


def mentions(root: Path, module: str, word: str) -> bool:
    """Whether the text of `module` contains `word`."""
    path = root.joinpath(*module.split(".")).with_suffix(".py")
    return path.is_file() and word in path.read_text(encoding="utf-8")


def lookup(names: Names, qualified: str) -> list[str] | None:
    """What `names` says of a qualified name, searched in base classes of the same module too. KeyError if absent."""
    if qualified in names:
        return names[qualified]
    owner, _, member = qualified.rpartition(".")
    for base in names.get(owner) or () if owner else ():
        try:
            return lookup(names, f"{base}.{member}")
        except KeyError:
            continue
    raise KeyError(qualified)


def _collect(body: list[ast.stmt], prefix: str, names: Names) -> None:
    for node in body:
        if isinstance(node, ast.ClassDef):
            names[prefix + node.name] = [base.id for base in node.bases if isinstance(base, ast.Name)]
            _collect(node.body, f"{prefix}{node.name}.", names)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = node.args
            named = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
            names[prefix + node.name] = named + [f"*{a.arg}" for a in (arguments.vararg, arguments.kwarg) if a]
        elif isinstance(node, ast.Assign):
            names.update({prefix + target.id: None for target in node.targets if isinstance(target, ast.Name)})
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names[prefix + node.target.id] = None
