# SPDX-License-Identifier: Apache-2.0
"""Links between the documents lead somewhere, headings included; the kernels' tables and picture are their results'."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "HACKING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def headings(path: Path) -> set[str]:
    """As the names that a browser jumps to."""
    lines = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links(document):
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if link.startswith("http"):
            continue
        name, _, heading = link.partition("#")
        target = (document.parent / name).resolve() if name else document
        assert target.exists(), link
        assert not heading or heading in headings(target), link


RESULTS = [ROOT / "bench" / "results" / f"cuda-{name}.jsonl" for name in ("attend", "append", "expand")]


def run(script: str, *arguments) -> str:
    command = [sys.executable, str(ROOT / "bench" / "cuda" / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_kernels_tables():
    assert (ROOT / "docs" / "kernels.md").read_text().endswith(run("speed_summary.py", "--markdown", *RESULTS))


def test_kernels_picture(tmp_path):
    run("picture.py", RESULTS[0], tmp_path / "attention.svg")
    assert (tmp_path / "attention.svg").read_text() == (ROOT / "docs" / "pictures" / "attention.svg").read_text()
