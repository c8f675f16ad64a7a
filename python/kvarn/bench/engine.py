# SPDX-License-Identifier: Apache-2.0
"""One cache dtype: vLLM in this process, every mix of requests, a JSON line for each.

    python -m kvarn.bench.engine '{"model": folder, "kv_cache_dtype": .., "mixes": [[64, 2048, 48, null, null], ..]}'

A mix (kvarn.bench.mix: requests, context, output, least, new) starts all requests at once. `prefill_s` ends when the
last of them has its first token; `step_ms` is the median of the steps in which every request decodes, `step_mean_ms`
their mean, `step_tokens` what a request gains in one, more than 1 with drafts, `hit_tokens` what one found of its
prompt in the prefix cache, on average. A mix that is not done in `mix_seconds` is given up: its line says so in
`not_done_s` and has what was measured by then. Without mixes the line of the start is all. Standard output carries the
JSON lines only, everything else goes to standard error.
"""

import json
import logging
import math
import os
import re
import sys
import time

from kvarn.bench.mix import Mix
from kvarn.bench.run import run_mix


def main() -> None:
    """The process's whole life."""
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    asked = json.loads(sys.argv[1])
    mixes = asked["mixes"] = [Mix(*mix) for mix in asked["mixes"]]
    facts = {"kv_cache_dtype": asked["kv_cache_dtype"]}

    def tell(**line) -> None:
        lines.write(json.dumps(facts | line) + "\n")

    started, capacity = time.perf_counter(), Capacity()
    try:
        llm = start(asked, capacity)
    except Exception as error:
        tell(error=f"{type(error).__name__}: {error}")
        raise SystemExit(1) from error
    start_s = round(time.perf_counter() - started, 2)
    facts |= machine() | scheduling(llm.llm_engine.vllm_config)
    tell(start_s=start_s, fit_tokens=capacity.tokens)
    if mixes:
        run_mix(llm, Mix(4, 300, 8))  # warm-up
    for mix in mixes:
        try:
            tell(**mix._asdict(), **run_mix(llm, mix, asked.get("mix_seconds", math.inf), asked.get("profile", False)))
        except Exception as error:
            tell(**mix._asdict(), error=f"{type(error).__name__}: {error}")
            raise SystemExit(1) from error


def machine() -> dict:
    """What this process runs on."""
    import torch
    import vllm

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"device": device, "vllm": vllm.__version__}


def scheduling(config) -> dict:
    """What of a VllmConfig decides how much of the host's time a step shows."""
    return {
        "runner": 2 if getattr(config, "use_v2_model_runner", False) else 1,
        "schedules_ahead": bool(config.scheduler_config.async_scheduling),
    }


def contender(name: str) -> tuple[str, dict]:
    """The cache dtype of "fp8" or "fp8+ngram_gpu:4", and vLLM's options for the drafts, four a step, if there are any.

    N-grams of one token on, so that few steps find none: model runner 1 verifies only what was found. Methods that need
    more get it from `options`. Raises ValueError.
    """
    match = re.fullmatch(r"([^+]+)(?:\+(\w+):([1-9]\d*))?", name)
    if not match:
        raise ValueError(f"{name!r} is not a cache dtype; with drafts write fp8+ngram_gpu:4")
    dtype, method, drafts = match.groups()
    if not method:
        return dtype, {}
    lookup = {"prompt_lookup_max": 3, "prompt_lookup_min": 1} if method.startswith("ngram") else {}
    return dtype, {"method": method, "num_speculative_tokens": int(drafts)} | lookup


class Capacity(logging.Filter):
    """Listens to vLLM for how many tokens fit: it says so in every release, and counts the pages ahead of requests.

    A filter of the logger that says it: 0.32 and later take every handler away when an engine starts.
    """

    tokens: int | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        if found := re.search(r"KV cache size: ([\d,]+) tokens", record.getMessage()):
            self.tokens = int(found[1].replace(",", ""))
        return True


def start(asked: dict, capacity: Capacity):
    """vLLM with the asked options, in this process."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    logging.getLogger("vllm.v1.core.kv_cache_utils").addFilter(capacity)

    options = {
        "enable_prefix_caching": any(mix.new for mix in asked["mixes"]),
        "max_num_batched_tokens": 16384,
        "gpu_memory_utilization": 0.9,
        "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
    }
    options |= asked.get("options", {})
    dtype, drafting = contender(asked["kv_cache_dtype"])
    if drafting:
        options["speculative_config"] = drafting | options.get("speculative_config", {})
    if asked.get("dummy"):
        options["load_format"] = "dummy"
    return LLM(model=asked["model"], kv_cache_dtype=dtype, **options)


if __name__ == "__main__":
    main()
