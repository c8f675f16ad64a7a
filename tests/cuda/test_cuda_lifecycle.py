# SPDX-License-Identifier: Apache-2.0
"""The CPU's life-cycle fuzzing (tests/python/serving.py) on the GPU: random schedules, the same oracle."""

import kvarn
import pytest
from gpu import FEW_SHAPES, MAIN, SHAPES
from hypothesis import given, seed, settings
from serving import Mismatch, Server
from test_lifecycle import DEMANDING, SEEDED, play, schedule
from verbs import CudaVerbs


@pytest.mark.parametrize("encoder", ["weighted", "varnorm"])
@pytest.mark.parametrize(("preset", "head_dim"), FEW_SHAPES)
def test_random_schedules(preset, head_dim, encoder):
    layout = kvarn.Layout(preset, head_dim, 2)
    verbs = CudaVerbs()

    @seed(head_dim + len(encoder))
    @settings(SEEDED, max_examples=12)
    @given(schedule)
    def run(operations):
        play(Server(verbs, layout, dtype="float16", encoder=encoder, group=3), operations)

    run()


@pytest.mark.parametrize(("preset", "head_dim"), SHAPES)
def test_a_demanding_schedule(preset, head_dim):
    assert play(Server(CudaVerbs(), kvarn.Layout(preset, head_dim, 1)), DEMANDING) > 10


def test_decode_passes_every_length():
    server = Server(CudaVerbs(), kvarn.Layout(*MAIN, 1), group=8)
    server.start(0, 0)
    for _ in range(2 * server.layout.page_tokens + 60):
        server.step([(0, 1, 0)])
    server.finish()


def test_chunks_and_drafts_from_every_length():
    server = Server(CudaVerbs(), kvarn.Layout(*MAIN, 1), pool_pages=40)
    n = server.layout.raw_tokens_per_page
    for length in range(1, 129):
        server.start(0, 0)
        server.step([(0, length, 0)])
        server.step([(0, 1 + n, n - length % 3 * (n // 2))])
        server.step([(0, 100 + length % 90, 0)])
        server.end(0)


@pytest.mark.parametrize("fault", ["no pages ahead", "no staging", "incomplete tile shared"])
def test_faults_of_the_engine_are_found(fault):
    with pytest.raises(Mismatch):
        play(Server(CudaVerbs(), kvarn.Layout(*MAIN, 1), fault=fault), DEMANDING)
