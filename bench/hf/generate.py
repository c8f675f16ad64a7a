# SPDX-License-Identifier: Apache-2.0
"""A transformers model on kvarn.hf.Cache beside DynamicCache with scaled_dot_product_attention, in one run.

    python bench/hf/generate.py [MODEL] [--contexts 2048 8192] [--presets kvarn_k4v2_g128 ..] [--out file]

MODEL is a folder or a name (default: the demo's SmolLM2). Per context a prompt of text is read, then tokens are decoded
one by one; each contender in turn, all of it twice, the better time of the two is reported. No time counts without its
answer: the mean KL divergence of the prompt's last 256 next-token distributions from those with the 16-bit cache must
be small. Prints and appends one JSON object a line.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import time
from pathlib import Path

import torch
import transformers
from kvarn.hf import Cache
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

STEPS, CHECKED = 32, 256
ALLOWED_DIVERGENCE = 0.3
TEXT = Path(__file__).parents[2] / "docs" / "specification.md"


def prompt(tokenizer, tokens: int) -> torch.Tensor:
    """[1, tokens]: the specification's text, again and again."""
    ids = tokenizer(TEXT.read_text(), return_tensors="pt").input_ids
    return ids.repeat(1, -(-tokens // ids.shape[1]))[:, :tokens]


def nbytes(cache) -> int:
    return cache.nbytes if isinstance(cache, Cache) else sum(x.keys.nbytes + x.values.nbytes for x in cache.layers)


@torch.no_grad()
def measure(model, cache, ids: torch.Tensor) -> dict:
    """Seconds to read the prompt, milliseconds a step, the cache's bytes, and the checked distributions."""
    started = time.perf_counter()
    answer = model(ids, past_key_values=cache, logits_to_keep=CHECKED).logits[0].float().log_softmax(-1)
    prefill, token = time.perf_counter() - started, answer[-1:].argmax(-1, keepdim=True)
    started = time.perf_counter()
    for _ in range(STEPS):
        token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
    step = 1000 * (time.perf_counter() - started) / STEPS
    return {"prefill_s": prefill, "step_ms": step, "cache_bytes": nbytes(cache), "answer": answer}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--contexts", nargs="+", type=int, default=[512, 2048, 8192])
    parser.add_argument("--presets", nargs="+", default=["kvarn_k4v2_g128", "kvarn_k4v4_g128"])
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    if asked.model is None:
        from kvarn.demo.model import smollm2

        asked.model = smollm2()
    model = AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    run = {
        "date": str(datetime.date.today()), "commit": commit, "machine": platform.machine(),
        "threads": torch.get_num_threads(), "transformers": transformers.__version__, "bench": "hf_generate",
        "model": Path(asked.model).name, "dtype": "bfloat16",
    }  # fmt: skip
    contenders = {"sdpa": lambda: DynamicCache(config=model.config)}
    contenders |= {preset: lambda preset=preset: Cache(model.config, preset) for preset in asked.presets}
    for context in asked.contexts:
        ids, best = prompt(tokenizer, context), {}
        for _ in range(2):
            for name, cache in contenders.items():
                model.set_attn_implementation("sdpa")
                found = measure(model, cache(), ids)
                exact = best["sdpa"]["answer"] if best else found["answer"]
                divergence = float((exact.exp() * (exact - found["answer"])).sum(-1).mean())
                if not divergence < ALLOWED_DIVERGENCE:
                    raise SystemExit(f"{name} at {context}: a wrong answer, mean KL divergence {divergence:.3f}")
                found["divergence"] = divergence
                before = best.setdefault(name, found)
                best[name] |= {key: min(before[key], found[key]) for key in ("prefill_s", "step_ms")}
        for name, found in best.items():
            row = run | {"cache": name, "context": context} | {k: v for k, v in found.items() if k != "answer"}
            row = {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}
            print(json.dumps(row), flush=True)
            if asked.out:
                with asked.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
