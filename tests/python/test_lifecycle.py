"""The life of pages under random schedules, without an engine. serving.py has the server and its oracle.

Hypothesis draws lists of operations and shrinks a failing one to the few that matter. Every seed is fixed; SCHEDULES of
about 25 operations each make some 3,000 steps per layout.
"""

from types import SimpleNamespace

import kvarn
import pytest
from cases import TARGETS, hashed, verbs_of
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from kvarn import reference
from serving import Mismatch, Server, check_oracle

SCHEDULES = 150
SEEDED = settings(database=None, deadline=None, suppress_health_check=list(HealthCheck))

edges = st.sampled_from([63, 64, 65, 127, 128, 129, 156, 256])
chunk = st.one_of(st.just(1), st.integers(1, 40), st.integers(41, 700), edges)
part = st.tuples(st.integers(0, 5), chunk, st.one_of(st.just(0), st.integers(0, 28)))
operation = st.one_of(
    st.tuples(st.just("start"), st.integers(0, 5), st.integers(0, 6)),
    st.tuples(st.just("step"), st.lists(part, min_size=1, max_size=4)),
    st.tuples(st.just("step"), st.lists(part, min_size=1, max_size=4)),
    st.tuples(st.just("decode"), st.integers(1, 12), st.integers(0, 4)),
    st.tuples(st.sampled_from(["end", "preempt"]), st.integers(0, 5)),
)
schedule = st.lists(operation, min_size=10, max_size=40)

LAYOUTS = [("kvarn_k4v2_g128", 64, 1), ("kvarn_k2v2_g64", 64, 2), ("kvarn_k8v4_g64", 80, 1)]


def play(server, operations):
    """Runs the operations, starting with one request so that a short list is not idle; returns the steps made."""
    server.start(0, 0)
    for kind, *arguments in operations:
        if kind == "decode":  # every request by one token and some drafts, several times over
            for _ in range(arguments[0]):
                drafts = arguments[1]
                server.step([(which, 1 + drafts, (which + server.steps) % (drafts + 1)) for which in range(4)])
        else:
            getattr(server, kind)(*arguments)
    server.finish()
    return server.steps


@pytest.mark.parametrize(("preset", "head_dim", "heads"), LAYOUTS)
def test_random_schedules(preset, head_dim, heads):
    layout, verbs, steps = kvarn.Layout(preset, head_dim, heads), verbs_of(TARGETS[0]), []

    @seed(head_dim + heads)
    @settings(SEEDED, max_examples=SCHEDULES)
    @given(schedule)
    def run(operations):
        steps.append(play(Server(verbs, layout), operations))

    run()
    assert sum(steps) > 2000  # how many exactly is up to hypothesis's release


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("encoder", ["weighted", "varnorm"])
def test_random_schedules_on_every_target(target, encoder):
    layout = kvarn.Layout("kvarn_k4v3_g64", 64, 1)

    @seed(len(encoder))
    @settings(SEEDED, max_examples=3 if target == "scalar" else 15)
    @given(schedule)
    def run(operations):
        play(Server(verbs_of(target), layout, dtype="float16", encoder=encoder, group=3), operations)

    run()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("preset", "head_dim", "heads"), LAYOUTS)
def test_the_oracle_is_right(preset, head_dim, heads, target):
    layout = kvarn.Layout(preset, head_dim, heads)
    server = Server(verbs_of(target), layout)
    tokens = (hashed((500,), 3) * 1000).astype(int) % 61
    for length in (1, 63, 128, 129, 300, 500):
        check_oracle(server.verbs, layout, server.model, list(tokens[:length]), "weighted", target)


@pytest.mark.parametrize("preset", ["kvarn_k4v2_g128", "kvarn_k2v2_g128", "kvarn_k4v4_g64"])
def test_decode_passes_every_length(preset):
    server = Server(verbs_of(TARGETS[0]), kvarn.Layout(preset, 64, 1))
    server.start(0, 0)
    for _ in range(2 * server.layout.page_tokens + 60):
        server.step([(0, 1, 0)])
    server.finish()


@pytest.mark.parametrize("preset", ["kvarn_k4v2_g128", "kvarn_k8v4_g64"])
def test_chunks_and_drafts_from_every_length(preset):
    """From each length modulo 128: n drafts of which all, some or none stay, then a chunk that passes a tile's edge."""
    server = Server(verbs_of(TARGETS[0]), kvarn.Layout(preset, 64, 1), pool_pages=40)
    n = server.layout.raw_tokens_per_page
    for length in range(1, 129):
        server.start(0, 0)
        server.step([(0, length, 0)])
        server.step([(0, 1 + n, n - length % 3 * (n // 2))])
        server.step([(0, 100 + length % 90, 0)])
        server.end(0)


# A schedule that meets every mechanism: it must pass as it is, and fail with each planted fault.
DEMANDING = [
    ("step", [(0, 100, 0)]), ("step", [(0, 130, 0)]), ("start", 0, 0), ("step", [(0, 1, 0), (1, 90, 0)]),
    ("step", [(0, 90, 0), (1, 200, 0)]), ("start", 1, 9), ("step", [(0, 1, 0), (1, 70, 5), (2, 60, 0)]),
    ("decode", 12, 3), ("step", [(0, 150, 0), (1, 150, 0), (2, 150, 0)]), ("preempt", 1), ("step", [(1, 180, 0)]),
    ("step", [(1, 180, 0)]),
]  # fmt: skip


@pytest.mark.parametrize("preset", ["kvarn_k4v2_g128", "kvarn_k4v2_g64"])
@pytest.mark.parametrize("fault", [None, "no pages ahead", "no staging", "incomplete tile shared"])
def test_faults_of_the_engine_are_found(preset, fault):
    server = Server(verbs_of(TARGETS[0]), kvarn.Layout(preset, 64, 1), fault=fault)
    if fault is None:
        assert play(server, DEMANDING) > 10
    else:
        with pytest.raises(Mismatch):
            play(server, DEMANDING)


FAULTS = {
    "raw tokens never staged": ("in_pages", lambda self, tile: True),
    "one token too many past the edge": (
        "in_pages",
        lambda self, tile: self.length - (tile + 1) * self.layout.page_tokens <= self.layout.raw_tokens_per_page + 1,
    ),
}


@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_faults_of_the_library_are_found(fault, monkeypatch):
    """The same schedule through the numpy reference, whose rules can be broken."""
    verbs = SimpleNamespace(append=reference.append, attend=reference.attend, expand=reference.expand)
    server = Server(verbs, reference.Layout("kvarn_k4v2_g64", 64, 1))
    if fault is None:
        play(server, DEMANDING)
        return
    monkeypatch.setattr(reference._Request, *FAULTS[fault])
    with pytest.raises(Mismatch):
        play(server, DEMANDING)
