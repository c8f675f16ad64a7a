"""Decode throughput of stock vLLM on this CPU: 8 concurrent requests of 2,048 tokens, one KV cache dtype after another.

    python bench/serve/decode.py [--model FOLDER] [--kv auto kvarn_k4v2_g128] [--requests 8] [--context 2048]

Each dtype runs in a process of its own, in turns over the rounds; a step's time is (time for `new` tokens - time for
one) / (new - 1), so prefill is left out. Both answers are compared token by token. Appends JSON lines to --out.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results" / "cpu-serve.jsonl"


def prompts(model: str, requests: int, context: int) -> list[list[int]]:
    """Different windows of this repository's own specification, so that nothing is shared."""
    from transformers import AutoTokenizer

    text = (Path(__file__).parents[2] / "docs" / "specification.md").read_text()
    ids = AutoTokenizer.from_pretrained(model)(text).input_ids
    ids = ids * (1 + (requests * 97 + context) // len(ids))
    return [ids[97 * r : 97 * r + context] for r in range(requests)]


def worker(arguments) -> None:
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    llm = LLM(
        model=arguments.model, kv_cache_dtype=arguments.worker, max_model_len=arguments.context + arguments.new + 8,
        enforce_eager=True, enable_prefix_caching=False, max_num_seqs=arguments.requests, disable_log_stats=True,
        max_num_batched_tokens=4096,
    )  # fmt: skip
    batch = [
        TokensPrompt(prompt_token_ids=ids) for ids in prompts(arguments.model, arguments.requests, arguments.context)
    ]

    def generate(tokens: int):
        start = time.perf_counter()
        out = llm.generate(batch, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True), use_tqdm=False)
        return time.perf_counter() - start, [list(o.outputs[0].token_ids) for o in out]

    generate(2)
    first, _ = generate(1)
    whole, tokens = generate(arguments.new)
    step = (whole - first) / (arguments.new - 1)
    print("RESULT " + json.dumps({"prefill_s": first, "step_ms": 1e3 * step, "tokens": tokens}), flush=True)


def run(arguments, kv: str) -> dict:
    command = [sys.executable, __file__, "--worker", kv, "--model", arguments.model]
    for name in ("requests", "context", "new"):
        command += [f"--{name}", str(getattr(arguments, name))]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_LOGGING_LEVEL": "WARNING"} | dict(os.environ)
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        sys.exit(f"vLLM with {kv} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(lines[0][7:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--kv", nargs="+", default=["auto", "kvarn_k4v2_g128"])
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--new", type=int, default=65)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.model:
        from kvarn.demo.model import smollm2

        arguments.model = str(smollm2())
    if arguments.worker:
        return worker(arguments)
    results = {kv: [run(arguments, kv)] for kv in arguments.kv}
    for _ in range(arguments.rounds - 1):
        for kv in arguments.kv:
            results[kv].append(run(arguments, kv))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    base = results[arguments.kv[0]]
    for kv, runs in results.items():
        best = min(runs, key=lambda r: r["step_ms"])
        same = [
            x == y
            for ours, theirs in zip(base[0]["tokens"], runs[0]["tokens"], strict=True)
            for x, y in zip(ours, theirs, strict=True)
        ]
        line = {
            "date": datetime.date.today().isoformat(),
            "commit": commit,
            "machine": platform.machine(),
            "bench": "serve_decode",
            "model": Path(arguments.model).name,
            "kv": kv,
            "shape": f"{arguments.requests}x{arguments.context}",
            "step_ms": round(best["step_ms"], 2),
            "tokens_per_second": round(1e3 * arguments.requests / best["step_ms"], 1),
            "prefill_s": round(min(r["prefill_s"] for r in runs), 2),
            "steps_ms": [round(r["step_ms"], 2) for r in runs],
            "same_tokens_percent": round(100 * sum(same) / len(same), 1),
            "times_" + arguments.kv[0]: round(min(r["step_ms"] for r in base) / best["step_ms"], 3),
        }
        print(json.dumps(line), flush=True)
        with arguments.out.open("a") as out:
            out.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
