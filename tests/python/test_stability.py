"""A row's bits do not depend on the batch around it, on how its prompt was cut, or on the number of threads."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import kvarn
import numpy as np
import pytest
import torch
from cases import TARGETS, Step, disjoint_tables, hashed, pool, verbs_of
from kvarn import reference
from tolerance import assert_close

H, GROUP = 2, 3


class Request:
    """The tokens of one request as vectors, and where it is."""

    def __init__(self, seed, tokens, head_dim):
        self.k, self.v = hashed((tokens, H, head_dim), 3 * seed), hashed((tokens, H, head_dim), 3 * seed + 1)
        self.q, self.tokens = hashed((tokens, H * GROUP, head_dim), 3 * seed + 2), tokens


def play(verbs, layout, requests, schedule):
    """schedule: steps, each a list of (request, tokens before, new tokens). Returns all rows of each request, and its
    expanded tiles."""
    tables, count = disjoint_tables(layout, [request.tokens for request in requests])
    pages, rows = pool(layout, count), [np.zeros_like(request.q) for request in requests]
    for step in schedule:
        batch = Step.of([tables[r] for r, _, _ in step], [b + n for _, b, n in step], [n for _, _, n in step])
        k, v, q = (
            np.concatenate([getattr(requests[r], name)[b : b + n] for r, b, n in step]) for name in ("k", "v", "q")
        )
        verbs.append(layout, pages, *batch, k, v)
        out = verbs.attend(layout, pages, *batch, q, scale=layout.head_dim**-0.5)
        for (r, b, n), start in zip(step, batch.query_starts, strict=False):
            rows[r][b : b + n] = out[start : start + n]
    every = Step.of(tables, [request.tokens for request in requests], [0] * len(requests))
    return [*rows, *verbs.expand(layout, pages, every.block_table, every.seq_lens)]


def assert_same_bits(ours, theirs, context):
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert np.array_equal(a, b), f"{context}: part {index}, first at {np.argwhere(a != b)[0]}"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("preset_dim", [("kvarn_k4v2_g128", 128), ("kvarn_k3v4_g64", 80), ("kvarn_k8v4_g128", 64)])
def test_batch_order_and_chunking(preset_dim, target):
    layout, verbs = kvarn.Layout(preset_dim[0], preset_dim[1], H), verbs_of(target)
    requests = [Request(seed, tokens, preset_dim[1]) for seed, tokens in enumerate((300, 1, 129, 257, 64))]
    lengths = [request.tokens for request in requests]
    together = play(verbs, layout, requests, [[(r, 0, n) for r, n in enumerate(lengths)]])
    backwards = play(verbs, layout, requests, [[(r, 0, n) for r, n in reversed(list(enumerate(lengths)))]])
    alone = play(verbs, layout, requests, [[(r, 0, n)] for r, n in enumerate(lengths)])
    assert_same_bits(backwards, together, "batch reversed")
    assert_same_bits(alone, together, "one request at a time")
    for chunk in (1, 7, 37, 64, 100, 128, 129, 200):
        steps = []
        for start in range(0, max(lengths), chunk):
            steps.append([(r, start, min(chunk, n - start)) for r, n in enumerate(lengths) if start < n])
        assert_same_bits(play(verbs, layout, requests, steps), together, f"chunks of {chunk}")


def test_torch_threads_do_not_matter():
    layout, before = kvarn.Layout("kvarn_k4v2_g128", 64, H), torch.get_num_threads()
    requests = [Request(seed, tokens, 64) for seed, tokens in enumerate((600, 40, 257))]
    schedule = [[(r, 0, request.tokens) for r, request in enumerate(requests)]]
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(play(kvarn, layout, requests, schedule))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert_same_bits(other, results[0], "torch.set_num_threads")


@pytest.mark.parametrize("target", TARGETS)
def test_long_rows_that_threads_share(target):
    """5,000 tokens are 78 tiles: enough that several threads work on one row. Same bits, and right by the reference."""
    layout, tokens, before = kvarn.Layout("kvarn_k4v2_g64", 64, H), 5000, torch.get_num_threads()
    tables, count = disjoint_tables(layout, [tokens])
    pages, k, v = pool(layout, count), hashed((tokens, H, 64), 1), hashed((tokens, H, 64), 2)
    for start in range(0, tokens, 1000):
        step = Step.of(tables, [start + 1000], [1000])
        kvarn.append(layout, pages, *step, k[start : start + 1000], v[start : start + 1000], target=target)
    step, q, rows = Step.of(tables, [tokens], [3]), hashed((3, 2 * H, 64), 3), []
    try:
        for threads in (1, 2, 4, 7):
            torch.set_num_threads(threads)
            rows.append(kvarn.attend(layout, pages, *step, q, scale=0.125, target=target))
    finally:
        torch.set_num_threads(before)
    assert_same_bits(rows[1:], rows[:1] * 3, "torch.set_num_threads")
    exact = reference.attend(layout, pages, *step, q, scale=0.125, workspace={})
    assert_close(rows[0], exact, target, "long rows")


def test_openmp_threads_do_not_matter():
    digests = set()
    for threads in ("1", "3"):
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "OMP_DYNAMIC": "false"}
        result = subprocess.run(
            [sys.executable, Path(__file__)], env=environment, capture_output=True, text=True, check=True
        )
        digests.add(result.stdout)
    assert len(digests) == 1


if __name__ == "__main__":
    chosen = kvarn.Layout("kvarn_k4v2_g128", 128, H)
    many = [Request(seed, tokens, 128) for seed, tokens in enumerate((900, 40, 257, 1))]
    parts = play(kvarn, chosen, many, [[(r, 0, request.tokens) for r, request in enumerate(many)]])
    print(hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest())
