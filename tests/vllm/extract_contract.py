# SPDX-License-Identifier: Apache-2.0
"""Writes contract.json: of each vLLM release, the names and parameters that kvarn.vllm.contract looks for.

    pip download --no-deps vllm==0.33.0 && unzip -q vllm-0.33.0-*.whl 'vllm/*.py' -d 0.33.0
    python tests/vllm/extract_contract.py 0.33.0=0.33.0 [0.26.0=FOLDER ...]

Releases that are not named stay as they are. Names and parameters only: no text of vLLM enters this repository.
"""

import json
import sys
from pathlib import Path

from kvarn.vllm import contract, source

CONTRACT = Path(__file__).with_name("contract.json")


def extract(root: Path) -> dict:
    """{"names": {module: source.Names, only what HOOKS could ask for}, "runner_2_asks_spec": bool}"""
    wanted = [name for alternatives in contract.HOOKS.values() for names in alternatives.values() for name in names]
    modules = {name.module: source.names_of(root, name.module) or {} for name in wanted}
    members = {name.name.rpartition(".")[2] for name in wanted}
    owners = {name.name.partition(".")[0] for name in wanted}
    for names in modules.values():  # base classes may hold a member that we look for
        for _ in range(5):
            owners |= {base for owner in owners for base in names.get(owner) or ()}

    def keep(name: str) -> bool:
        owner, _, member = name.rpartition(".")
        return name in owners or (owner in owners and member in members) or (not owner and name in members)

    return {
        "names": {module: {k: v for k, v in names.items() if keep(k)} for module, names in sorted(modules.items())},
        "runner_2_asks_spec": contract.runner_2_asks_spec(root),
    }


def main(arguments: list[str]) -> None:
    known = json.loads(CONTRACT.read_text()) if CONTRACT.exists() else {}
    for argument in arguments:
        version, _, folder = argument.partition("=")
        known[version] = extract(Path(folder))
    CONTRACT.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
