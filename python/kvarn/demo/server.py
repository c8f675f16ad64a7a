# SPDX-License-Identifier: Apache-2.0
"""One `vllm serve` in a process group of its own: started, watched, asked for its cache size, ended."""

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

START_TIMEOUT_S = 600
STOP_TIMEOUT_S = 20
LOG_TAIL_LINES = 25


class ServerDied(RuntimeError):
    """The server ended by itself; the message ends with the last lines of its log."""


class Server:
    """`with Server(model, "kvarn_k4v2_g128", memory_gib=1) as server:` serves on `server.url` while inside.

    memory_gib       GiB of KV cache
    max_model_len    longest context, prompt and answer together
    progress         called with a few words when the server enters a new stage of its start
    Raises ServerDied if the server ends or does not answer in time.
    """

    # What the log says when a stage begins, and what we call the stage.
    STAGES = (
        ("Loading weights", "loading weights"),
        ("KV cache size", "setting up the cache"),
        ("Starting vLLM", "opening the port"),
    )

    def __init__(
        self,
        model: str,
        kv_cache_dtype: str,
        memory_gib: int,
        max_model_len: int = 8192,
        progress: Callable[[str], None] = lambda stage: None,
    ):
        self.kv_cache_dtype = kv_cache_dtype
        self.memory_bytes = memory_gib << 30
        self.model = model
        self._progress = progress
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._command = [
            *(str(Path(sys.executable).with_name("vllm")), "serve", model),
            *("--kv-cache-dtype", kv_cache_dtype, "--max-model-len", str(max_model_len)),
            *("--host", "127.0.0.1", "--port", str(port), "--enforce-eager", "--enable-prompt-tokens-details"),
        ]
        self._environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": str(memory_gib), "VLLM_NO_USAGE_STATS": "1"}
        if Path(model).exists():
            self._environment |= {"HF_HUB_OFFLINE": "1"}

    def __enter__(self) -> "Server":
        handle, log = tempfile.mkstemp(prefix=f"kvarn-demo-{self.kv_cache_dtype}-", suffix=".log")
        self.log = Path(log)
        with os.fdopen(handle, "wb") as sink:
            self._process = subprocess.Popen(
                self._command, stdout=sink, stderr=subprocess.STDOUT, env=self._environment, start_new_session=True
            )
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind, *_) -> None:
        self.stop()
        if kind is None:
            self.log.unlink(missing_ok=True)

    def check(self) -> None:
        """Raises ServerDied if the server is no longer there."""
        if self._process.poll() is not None:
            raise self._died(f"the server for {self.kv_cache_dtype} ended with status {self._process.returncode}")

    def tokens_that_fit(self) -> int:
        """What the server itself said its cache holds."""
        found = re.findall(r"KV cache size: ([\d,]+) tokens", self._log_text())
        if not found:
            raise self._died("the server's log does not say how many tokens its cache holds")
        return int(found[-1].replace(",", ""))

    def stop(self) -> None:
        """Ends the server and the processes it started; they form a group, and only that group is signalled."""
        for sign, patience in ((signal.SIGTERM, STOP_TIMEOUT_S), (signal.SIGKILL, STOP_TIMEOUT_S)):
            try:
                os.killpg(self._process.pid, sign)
            except ProcessLookupError:
                return
            try:
                self._process.wait(patience)
            except subprocess.TimeoutExpired:
                continue

    def _wait(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        stage = ""
        while time.monotonic() < deadline:
            self.check()
            log = self._log_text()
            reached = next((name for sign, name in reversed(self.STAGES) if sign in log), "starting vLLM")
            if reached != stage:
                self._progress(stage := reached)
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=2).close()
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.3)
        raise self._died(f"the server for {self.kv_cache_dtype} did not answer within {START_TIMEOUT_S} s")

    def _log_text(self) -> str:
        return self.log.read_text(errors="replace")

    def _died(self, what: str) -> ServerDied:
        tail = "\n".join(self._log_text().splitlines()[-LOG_TAIL_LINES:])
        return ServerDied(f"{what}. Command:\n  {' '.join(self._command)}\nThe last lines of {self.log}:\n{tail}")
