# SPDX-License-Identifier: Apache-2.0
"""One mix of requests through a vLLM engine in this process, step by step."""

import math
import statistics
import time

from kvarn.bench.mix import Mix


def run_mix(llm, mix: Mix, seconds: float = math.inf, profile: bool = False) -> dict:
    """All prompts at once, at least `mix.output` steps each beyond what the others' prefill takes.

    seconds  when it is given up
    profile  also which kernels run in a decode step; steps are then slower
    """
    from vllm import SamplingParams

    engine, requests = llm.llm_engine, mix.requests
    config = engine.vllm_config
    drafts = config.speculative_config
    prefills = requests * mix.context // config.scheduler_config.max_num_batched_tokens
    most = (mix.output + prefills + 2) * (1 + drafts.num_speculative_tokens if drafts else 1)
    prompts = mix.prompts(config.model_config.get_vocab_size())
    if config.cache_config.enable_prefix_caching:
        engine.reset_prefix_cache()  # of other mixes
    if mix.new:
        see(engine, [prompt[: -mix.new] for prompt in prompts])
    names = [f"{mix}-{i}" for i in range(requests)]
    params = SamplingParams(temperature=0.0, max_tokens=most, ignore_eos=True, detokenize=False)
    for name, prompt in zip(names, prompts, strict=True):
        engine.add_request(name, {"prompt_token_ids": prompt}, params)
    begun = time.perf_counter()
    tokens: dict[str, int] = {}
    prefill, steps, left, profiler, gained, hits = None, [], requests, None, 0, 0
    while engine.has_unfinished_requests():
        before = time.perf_counter()
        if before - begun > seconds:
            give_up(engine, names)
            return measured(prefill, steps, gained / requests) | {"not_done_s": seconds}
        outputs = engine.step()
        now = time.perf_counter()
        had = sum(tokens.values())
        for one in outputs:
            hits += 0 if one.request_id in tokens else one.num_cached_tokens or 0
            tokens[one.request_id] = len(one.outputs[0].token_ids)
            left -= one.finished
        if prefill is not None and left == requests and len(outputs) == requests:
            steps.append(now - before)
            gained += sum(tokens.values()) - had
            if profile and len(steps) == mix.output // 2:
                profiler = Profiler()
            if profiler and len(steps) == mix.output // 2 + PROFILED:
                profiler.stop()
        if prefill is None and len(tokens) == requests:
            prefill = now - begun
    if min(tokens.values()) != most:
        raise RuntimeError(f"a request ended after {min(tokens.values())} of {most} tokens")
    took = time.perf_counter() - begun
    whole = {"total_s": round(took, 3), "output_tokens_per_s": round(sum(tokens.values()) / took, 1)}
    whole |= {"hit_tokens": round(hits / requests)} if mix.new else {}
    return measured(prefill, steps, gained / requests) | whole | ({"kernels": profiler.kernels} if profiler else {})


def see(engine, prompts: list[list[int]]) -> None:
    """Has the engine compute the prompts, and a token behind each."""
    from vllm import SamplingParams

    for i, prompt in enumerate(prompts):
        engine.add_request(f"seen-{i}", {"prompt_token_ids": prompt}, SamplingParams(max_tokens=1, detokenize=False))
    finish(engine)


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
    finish(engine)
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def finish(engine) -> None:
    """Has the engine compute what it still has."""
    while engine.has_unfinished_requests():
        engine.step()


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
