# SPDX-License-Identifier: Apache-2.0
"""One cache dtype: vLLM in this process, every mix of requests, a JSON line for each.

    python -m kvarn.bench.engine '{"model": folder, "kv_cache_dtype": .., "mixes": [[64, 2048, 48, null], ..]}'

A mix (requests, context, output, least: serve.Mix) starts all requests at once. `prefill_s` ends when the last of them
has its first token; `step_ms` is the median of the steps in which every request decodes, `step_mean_ms` their mean,
`step_tokens` what a request gains in one, more than 1 with drafts. A mix that is not done in `mix_seconds` is given up:
its line says so in `not_done_s` and has what was measured by then. Without mixes the line of the start is all. Standard
output carries the JSON lines only, everything else goes to standard error.
"""

import json
import logging
import math
import os
import random
import re
import statistics
import sys
import time


def main() -> None:
    """The process's whole life."""
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    asked = json.loads(sys.argv[1])
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
    if asked["mixes"]:
        run_mix(llm, 4, 300, 8)  # warm-up
    for requests, context, output, least in asked["mixes"]:
        mix = {"requests": requests, "context": context, "output": output, "least": least}
        try:
            most = asked.get("mix_seconds", math.inf)
            tell(**mix, **run_mix(llm, **mix, seconds=most, profile=asked.get("profile", False)))
        except Exception as error:
            tell(**mix, error=f"{type(error).__name__}: {error}")
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
        "enable_prefix_caching": False,
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


def run_mix(
    llm, requests: int, context: int, output: int, least: int | None = None, seconds: float = math.inf,
    profile: bool = False,
) -> dict:  # fmt: skip
    """Random prompts of `context` tokens, at least `output` steps each beyond what the others' prefill takes.

    least    the shortest prompt's tokens; None: all are alike
    seconds  when it is given up
    profile  also which kernels run in a decode step; steps are then slower
    """
    from vllm import SamplingParams

    engine = llm.llm_engine
    vocabulary = engine.vllm_config.model_config.get_vocab_size()
    chunk = engine.vllm_config.scheduler_config.max_num_batched_tokens
    drafts = engine.vllm_config.speculative_config
    most = (output + requests * context // chunk + 2) * (1 + drafts.num_speculative_tokens if drafts else 1)
    draw = random.Random(requests * 1_000_003 + context)
    params = SamplingParams(temperature=0.0, max_tokens=most, ignore_eos=True, detokenize=False)
    names = [f"{requests}x{context}-{i}" for i in range(requests)]
    for i, name in enumerate(names):
        length = context if least is None else least + (context - least) * i // max(1, requests - 1)
        prompt = [draw.randrange(2, vocabulary - 2) for _ in range(length)]
        engine.add_request(name, {"prompt_token_ids": prompt}, params)
    begun = time.perf_counter()
    tokens: dict[str, int] = {}
    prefill, steps, left, profiler, gained = None, [], requests, None, 0
    while engine.has_unfinished_requests():
        before = time.perf_counter()
        if before - begun > seconds:
            give_up(engine, names)
            return measured(prefill, steps, gained / requests) | {"not_done_s": seconds}
        outputs = engine.step()
        now = time.perf_counter()
        had = sum(tokens.values())
        for one in outputs:
            tokens[one.request_id] = len(one.outputs[0].token_ids)
            left -= one.finished
        if prefill is not None and left == requests and len(outputs) == requests:
            steps.append(now - before)
            gained += sum(tokens.values()) - had
            if profile and len(steps) == output // 2:
                profiler = Profiler()
            if profiler and len(steps) == output // 2 + PROFILED:
                profiler.stop()
        if prefill is None and len(tokens) == requests:
            prefill = now - begun
    if min(tokens.values()) != most:
        raise RuntimeError(f"a request ended after {min(tokens.values())} of {most} tokens")
    took = time.perf_counter() - begun
    whole = {"total_s": round(took, 3), "output_tokens_per_s": round(sum(tokens.values()) / took, 1)}
    return measured(prefill, steps, gained / requests) | whole | ({"kernels": profiler.kernels} if profiler else {})


def measured(prefill: float | None, steps: list[float], gained: float) -> dict:
    """Seconds; steps are those in which every request decodes, and gained what each has from all of them, tokens."""
    return {
        "prefill_s": None if prefill is None else round(prefill, 3),
        "step_ms": round(1e3 * statistics.median(steps), 3) if steps else None,
        "step_mean_ms": round(1e3 * statistics.fmean(steps), 3) if steps else None,
        "step_tokens": round(gained / len(steps), 2) if steps else None,
        "steps": len(steps),
    }


def give_up(engine, names: list[str]) -> None:
    """Ends the requests, and waits for what the device still computes for them."""
    import torch

    engine.abort_request(names)
    while engine.has_unfinished_requests():
        engine.step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()


PROFILED = 8  # steps


class Profiler:
    """What the device does from now on until `stop`: kernels, the most expensive first, [name, us, launches] a step."""

    def __init__(self):
        import torch

        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        self._profile.start()

    def stop(self) -> None:
        self._profile.stop()
        found = [event for event in self._profile.key_averages() if event.self_device_time_total > 0]
        found.sort(key=lambda event: -event.self_device_time_total)
        self.kernels = [
            [event.key[:120], round(event.self_device_time_total / PROFILED, 1), round(event.count / PROFILED, 2)]
            for event in found
        ]


if __name__ == "__main__":
    main()
