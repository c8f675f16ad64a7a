# SPDX-License-Identifier: Apache-2.0
"""One data-parallel rank in a process of its own, with vLLM's VLLM_DP_* variables set; see test_ranks.

python rank.py '{"model": .., "prompts": [..], "options": {..}, "answers": file}'
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from engine import Engine


def main() -> None:
    asked = json.loads(sys.argv[1])
    with Engine(asked["model"], in_process=False, **asked["options"]) as engine:
        answers = engine.run(asked["prompts"], tokens=12) + engine.run(asked["prompts"], tokens=12)
    Path(asked["answers"]).write_text(json.dumps([asdict(answer) for answer in answers]))


if __name__ == "__main__":
    main()
