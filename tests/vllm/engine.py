# SPDX-License-Identifier: Apache-2.0
"""A vLLM engine inside the test process, so that a test may reach into it; and what a run of prompts gave.

The same tests run on a CPU and on a GPU. On a GPU kvarn's own attention computes prompts, unless a test says otherwise,
and KVARN_TEST_RUNNER=2 chooses vLLM's model runner 2: their log-probabilities differ in the last bits, so that one
session has one of them.
"""

import gc
import logging
import os
from dataclasses import dataclass
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.platforms import current_platform

PRESET = "kvarn_k4v2_g128"
ON_GPU = current_platform.is_cuda()
RUNNER = os.environ.get("KVARN_TEST_RUNNER", "1")
# A decode step, or the verification of drafts, in one CUDA graph.
GRAPHS = {"enforce_eager": False, "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}}
CACHE = {"enable_prefix_caching": True}
# Marks of tests that only a GPU can run.
GPU = [pytest.mark.gpu, pytest.mark.skipif(not ON_GPU, reason="vLLM's CUDA platform")]
ROW_BY_ROW = pytest.mark.usefixtures("row_by_row")
COUNTERS = {
    "hits": "vllm:prefix_cache_hits",
    "external hits": "vllm:external_prefix_cache_hits",
    "preemptions": "vllm:num_preemptions",
    "drafted": "vllm:spec_decode_num_draft_tokens",
    "accepted": "vllm:spec_decode_num_accepted_tokens",
}


@dataclass(frozen=True)
class Answer:
    """One completion: its tokens, and the log-probability of each, exact."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]

    @classmethod
    def of(cls, completion) -> "Answer":
        steps = zip(completion.token_ids, completion.logprobs, strict=True)
        return cls(tuple(completion.token_ids), tuple(step[token].logprob for token, step in steps))


class Engine:
    """`with Engine(model, ...) as engine:`; options are vLLM's, with these defaults. One thread, in this process.

    in_process  False: vLLM's scheduler and workers are processes of their own, as a server has them
    """

    def __init__(self, model, in_process: bool = True, **options):
        defaults = {
            "kv_cache_dtype": PRESET,
            "max_model_len": 1024,
            "max_num_batched_tokens": 4096,
            "max_num_seqs": 8,
            "enable_prefix_caching": False,
            "num_gpu_blocks_override": 400,
            "kv_cache_memory_bytes": 1 << 30,
            "enforce_eager": True,
            "skip_tokenizer_init": True,
        } | (_on_gpu() if ON_GPU else {})
        self._options = defaults | options | {"model": str(model), "disable_log_stats": False}
        self._in_process, self._cached = in_process, 0

    def __enter__(self) -> "Engine":
        if self._in_process:
            logging.getLogger("vllm").setLevel(logging.ERROR)
        self._patch, self._threads = pytest.MonkeyPatch(), torch.get_num_threads()
        self._patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", str(int(not self._in_process)))
        if ON_GPU:
            self._patch.setenv("VLLM_USE_V2_MODEL_RUNNER", str(int(RUNNER == "2")))
            # vLLM's graphs of a process share one memory pool, which goes with the first engine's.
            self._patch.setattr(type(current_platform), "_global_graph_pool", None)
            if "KVARN_PROMPTS" not in os.environ:
                self._patch.setenv("KVARN_PROMPTS", "exact")
        self._patch.setattr(torch, "set_num_threads", torch.set_num_threads)  # vLLM replaces it
        torch.set_num_threads(1)
        if not ON_GPU:
            self._keep_overrides()
        elif RUNNER == "1" and (self._options.get("speculative_config") or {}).get("method") == "ngram_gpu":
            self._leave_lookup_uncompiled()
        try:
            self.llm = LLM(**self._options)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _keep_overrides(self) -> None:
        """vLLM's search for kernels to override on a CPU reads every object of every module, and breaks on some of
        numba's (drafts import it). One engine per process never gets there; here the first one's overrides hold."""
        from vllm.triton_utils import dispatcher

        if dispatcher._registry:
            self._patch.setattr(dispatcher, "_rebind_kernels", lambda overrides: None)

    def _leave_lookup_uncompiled(self) -> None:
        """Model runner 1 compiles its lookup on the device, and fails where the model is not compiled. Here neither is,
        since linear layers go row by row."""
        from vllm.config import CompilationMode
        from vllm.v1.spec_decode import ngram_proposer_gpu

        never = SimpleNamespace(VLLM_COMPILE=CompilationMode.NONE)
        self._patch.setattr(ngram_proposer_gpu, "CompilationMode", never)

    def __exit__(self, *_) -> None:
        if hasattr(self, "llm"):
            self.llm.llm_engine.engine_core.shutdown()
            del self.llm
        cleanup_dist_env_and_memory()
        gc.collect()
        self._patch.undo()
        torch.set_num_threads(self._threads)

    def run(self, prompts: list[list[int]], tokens: int = 70, **sampling) -> list[Answer]:
        """Completions of token-id prompts, in order; greedy unless `sampling` says otherwise, never ended early."""
        params = _sampling(tokens, **sampling)
        outputs = self.llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        self._cached += sum(output.num_cached_tokens or 0 for output in outputs)
        return [Answer.of(completion) for output in outputs for completion in output.outputs]

    def start(self, name: str, prompt: list[int], tokens: int = 70) -> None:
        """Asks as `run` does, and leaves it to the caller to call `step`."""
        self.llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, _sampling(tokens))

    def step(self) -> dict[str, Answer]:
        """One step of the engine: the answers that it finished, by name."""
        return {out.request_id: Answer.of(out.outputs[0]) for out in self.llm.llm_engine.step() if out.finished}

    def abort_after(self, prompts: list[list[int]], steps: int) -> None:
        """Starts all prompts and gives them up together after some steps of the engine."""
        engine = self.llm.llm_engine
        names = [f"abandoned-{i}" for i in range(len(prompts))]
        for name, prompt in zip(names, prompts, strict=True):
            params = SamplingParams(max_tokens=500, ignore_eos=True, detokenize=False)
            engine.add_request(name, {"prompt_token_ids": prompt}, params)
        for _ in range(steps):
            engine.step()
        engine.abort_request(names)
        while engine.has_unfinished_requests():
            engine.step()

    def groups(self) -> list:
        """vLLM's KV cache groups."""
        return self.llm.llm_engine.model_executor.driver_worker.model_runner.kv_cache_config.kv_cache_groups

    def counters(self) -> dict[str, int]:
        """What vLLM counted since the engine started: COUNTERS."""
        values = {metric.name: getattr(metric, "value", 0) for metric in self.llm.get_metrics()}
        counted = {short: int(values.get(name, 0)) for short, name in COUNTERS.items()}
        # With asynchronous scheduling vLLM's own counter misses the first step after a pause.
        return counted | {"hits": max(counted["hits"], self._cached)}


def _on_gpu() -> dict:
    """Engines share a GPU. Newer releases compile Triton kernels ahead where a model is compiled, for minutes."""
    from vllm.config import KernelConfig

    warmup = "enable_jit_warmup" in KernelConfig.__dataclass_fields__
    return {"gpu_memory_utilization": 0.05} | ({"kernel_config": {"enable_jit_warmup": False}} if warmup else {})


def _sampling(tokens: int, **changes) -> SamplingParams:
    greedy = {"temperature": 0.0, "max_tokens": tokens, "ignore_eos": True, "logprobs": 0, "detokenize": False}
    return SamplingParams(**(greedy | changes))


def ngram(drafts: int, method: str = "ngram") -> dict:
    """Options that have vLLM look up drafts in what was said before; "ngram_gpu": on the device, scheduling ahead.

    vLLM's model runner 2, where it has n-grams (0.32 does), looks up on the device whichever is asked, and from 0.33 on
    schedules ahead for both.
    """
    _skip_runner_2_without("ngram", "n-grams")
    looked_up = {"method": method, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    return {"speculative_config": looked_up | {"num_speculative_tokens": drafts}}


def drafting(method: str, model, drafts: int) -> dict:
    """Options that have `model` propose drafts: "draft_model", "eagle"."""
    if method == "draft_model":
        _skip_runner_2_without("standalone_ar", "draft models")
    return {"speculative_config": {"method": method, "model": str(model), "num_speculative_tokens": drafts}}


def _skip_runner_2_without(module: str, what: str) -> None:
    if ON_GPU and RUNNER == "2" and find_spec(f"vllm.v1.worker.gpu.spec_decode.{module}") is None:
        pytest.skip(f"this vLLM has {what} with model runner 1 only")


def first_difference(ours: list[Answer], theirs: list[Answer]) -> str | None:
    """Where two runs of the same prompts differ, to the bit, or None."""
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if len(a.tokens) != len(b.tokens):
            return f"answer {index}: {len(a.tokens)} and {len(b.tokens)} tokens"
        for step, (token, other, logprob, other_logprob) in enumerate(
            zip(a.tokens, b.tokens, a.logprobs, b.logprobs, strict=True)
        ):
            if (token, logprob) != (other, other_logprob):
                return f"answer {index}, token {step}: {token} ({logprob!r}) and {other} ({other_logprob!r})"
    return None
