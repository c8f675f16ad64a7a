"""What can be said of the CUDA verbs without a GPU: the module loads anywhere and says why it cannot run, and its
operators have fakes that torch.compile can trace."""

import contextlib
import re
import subprocess
import sys

import kvarn
import pytest
import torch
from kvarn import _core, _launch, torch_ops
from torch._subclasses.fake_tensor import FakeTensorMode

LAYOUT = kvarn.Layout("kvarn_k4v2_g128", 128, 2)
without_gpu = pytest.mark.skipif(kvarn.cuda_available(), reason="there is a GPU")


def test_links_neither_torch_nor_the_driver():
    """One shared object for every torch; it loads on machines without CUDA."""
    listed = subprocess.run(["readelf", "-d", _core.__file__], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"NEEDED.*\[(.*)\]", listed)
    assert needed
    assert not [name for name in needed if re.search("torch|cuda|c10|nv", name)]


def test_kvarn_needs_no_torch_until_a_cuda_name_is_used():
    code = "import sys, kvarn; kvarn.cuda_available(); t = 'torch' in sys.modules; print(t, kvarn.plan)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.startswith("False <function plan")


@without_gpu
def test_says_why_not():
    assert kvarn.cuda_missing()
    with pytest.raises(RuntimeError, match=re.escape(kvarn.cuda_missing())):
        kvarn.CudaWorkspace(LAYOUT, 16, 2, 8, 1024)


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no_such_verb"):
        kvarn.no_such_verb  # noqa: B018


@pytest.mark.parametrize("option", ["slots", "plan", "replaced"])
def test_cuda_options_are_refused_on_the_cpu(option):
    pages = torch.zeros(6, LAYOUT.page_bytes, dtype=torch.uint8)
    step = [torch.arange(6, dtype=torch.int32)[None], *(torch.tensor(x, dtype=torch.int32) for x in ([3], [0, 3]))]
    k = torch.zeros(3, 2, 128)
    with pytest.raises(ValueError, match=f"{option} is for CUDA"):
        kvarn.append(LAYOUT, pages, *step, k, k, **{option: torch.zeros(3, dtype=torch.int64)})
    kvarn.append(LAYOUT, pages, *step, k, k)
    for name, value in (("window", 5), ("sinks", torch.zeros(2)), ("plan", 3)):
        with pytest.raises(ValueError, match=f"{name} is for CUDA"):
            kvarn.attend(LAYOUT, pages, *step, k, scale=1.0, **{name: value})
    with pytest.raises(ValueError, match="out is for CUDA"):
        kvarn.expand(LAYOUT, pages, *step[:2], out=(k, k))


@pytest.fixture
def in_host_memory(monkeypatch):
    """A workspace and tensors in this machine's memory: all that the library needs to find that there is no GPU."""
    monkeypatch.setattr(_launch, "on", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(_launch, "queue", lambda device: (0, 0))
    space = kvarn.CudaWorkspace.__new__(kvarn.CudaWorkspace)
    space.layout, space.limits = LAYOUT, (16, 2, 8, 1024, 8)
    memory = torch.zeros((1 << 20) + 256, dtype=torch.uint8)
    space.tensor = memory[-memory.data_ptr() % 256 :][: 1 << 20]
    return space


STEP = [torch.tensor(x, dtype=torch.int32) for x in ([[*range(6)], [*range(6, 12)]], [3, 2], [0, 3, 5])]
VERBS = {
    "plan": lambda c, plan, pages, k, q: kvarn.plan(LAYOUT, *STEP, tokens=5, query_heads=8, workspace=plan.workspace),
    "append": lambda c, plan, pages, k, q: c.append(
        LAYOUT, pages, None, None, None, k, k, None, "weighted", torch.zeros(2, 128, 128), torch.ones(2, 128), None,
        plan, torch.zeros(1, dtype=torch.int64),
    ),
    "pack": lambda c, plan, pages, k, q: c.pack(plan, c.Layers(LAYOUT, [pages] * 2, [None, torch.zeros(2, 128, 128)])),
    "attend": lambda c, plan, pages, k, q: c.attend(
        LAYOUT, pages, None, None, None, q, 0.1, 0.0, None, None, None, None, torch.zeros(8), torch.ones(2, 128), plan
    ),
    "expand": lambda c, plan, pages, k, q: c.expand(LAYOUT, pages, *STEP[:2], None, (k, k)),
    "rotate": lambda c, plan, pages, k, q: c.rotate(k),
    "prefill pages": lambda c, plan, pages, k, q: c.prefill_pages(
        plan, pages, torch.zeros(5, 4, dtype=torch.int32), torch.zeros(5, dtype=torch.int32),
        torch.zeros(6, dtype=torch.int32), *[torch.zeros(256, 2, 128).half()] * 2, torch.zeros(1, dtype=torch.int32),
    ),
}  # fmt: skip


@without_gpu
@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_reaches_the_library(in_host_memory, verb):
    """Its arguments are those that the library takes; what is missing is the GPU alone."""
    plan = kvarn.Plan(LAYOUT, *STEP, None, 5, 8, 3, 0, True, in_host_memory)
    pages = torch.zeros(20, LAYOUT.page_bytes, dtype=torch.uint8)
    k, q = torch.zeros(5, 2, 128).half(), torch.zeros(5, 8, 128).half()
    with pytest.raises(RuntimeError, match=re.escape(kvarn.cuda_missing())):
        VERBS[verb](kvarn.cuda, plan, pages, k, q)


def fake_step():
    device = "cuda"
    tables = torch.zeros(2, 6, dtype=torch.int32, device=device), torch.zeros(2, dtype=torch.int32, device=device)
    shared = [LAYOUT.preset, 128, 2, *tables, torch.zeros(3, dtype=torch.int32, device=device), None]
    pages = torch.zeros(20, LAYOUT.page_bytes, dtype=torch.uint8, device=device)
    workspace = torch.zeros(1 << 20, dtype=torch.uint8, device=device)
    k, q = (torch.zeros(5, heads, 128, dtype=torch.float16, device=device) for heads in (2, 8))
    return pages, workspace, [16, 2, 8, 1024, 8], shared, k, q


def test_operators_have_fakes():
    ops = torch.ops.kvarn
    with FakeTensorMode():
        pages, workspace, limits, shared, k, q = fake_step()
        assert ops.plan(workspace, limits, *shared, 5, 5, 8, 0, True) is None
        assert ops.pack([pages, pages], workspace, limits, *shared, 5, 5, "weighted", [None, None]) is None
        assert ops.append(pages, workspace, limits, *shared, 5, k, k, True, "weighted", None, None, None) is None
        out = torch.empty_like(q)
        assert ops.attend(pages, workspace, limits, *shared, 5, q, out, 0.1, 0.0, 0, None, None) is None
        assert ops.expand(pages, *shared[:5], k, k) is None
        rotated = ops.rotate(q)
    assert rotated.shape == q.shape and rotated.dtype == q.dtype and rotated.device == q.device


def traced(step, *arguments) -> list[str]:
    """The operators of ours in step's graph. Nothing runs: fullgraph fails on the first thing that cannot be traced."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.compile(step, fullgraph=True, backend=backend)(*arguments)
    called = [str(node.target) for node in graphs[0].graph.nodes if "kvarn" in str(node.target)]
    return [name.split(".")[1] for name in called]


def test_the_verbs_are_one_graph():
    """kvarn.plan and its fellows, as a model calls them, traced without a GPU."""

    def step(space, pages, tables, k, q, fed):
        plan = kvarn.plan(LAYOUT, *tables, tokens=5, query_heads=8, defer=True, workspace=space)
        kvarn.append(LAYOUT, pages, *tables, k * 2, k, feedback=fed, plan=plan)
        out = kvarn.attend(LAYOUT, pages, *tables, q + 1, scale=0.1, plan=plan)
        kvarn.cuda.pack(plan, kvarn.cuda.Layers(LAYOUT, [pages], [fed]))
        return out * kvarn.rotate(q)

    with FakeTensorMode():
        pages, workspace, limits, shared, k, q = fake_step()
        space = kvarn.CudaWorkspace.__new__(kvarn.CudaWorkspace)
        space.layout, space.limits, space.tensor = LAYOUT, tuple(limits), workspace
        fed = torch.zeros(2, 128, 128, device="cuda")
        called = traced(step, space, pages, shared[3:6], k, q, fed)
    assert called == ["plan", "append", "attend", "pack", "rotate"]


def test_schemas_say_what_is_written():
    written = {}
    for name in ("plan", "append", "pack", "attend", "expand", "rotate"):
        schema = getattr(torch.ops.kvarn, name).default._schema
        written[name] = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    assert written == {
        "plan": ["workspace"],
        "append": ["pages", "workspace", "replaced"],
        "pack": ["pages", "workspace"],
        "attend": ["workspace", "out"],
        "expand": ["k", "v"],
        "rotate": [],
    }


def test_a_step_is_one_graph():
    def step(pages, workspace, limits, shared, k, q):
        torch.ops.kvarn.plan(workspace, limits, *shared, 5, 5, 8, 0, True)
        b, ones = k.new_zeros(2, 128, 128, dtype=torch.float32), k.new_ones(2, 128, dtype=torch.float32)
        torch.ops.kvarn.append(pages, workspace, limits, *shared, 5, k * 2, k, True, "weighted", b, ones, None)
        out = torch.empty_like(q)
        torch.ops.kvarn.attend(pages, workspace, limits, *shared, 5, q + 1, out, 0.1, 0.0, 0, None, ones)
        torch.ops.kvarn.pack([pages], workspace, limits, *shared, 5, 5, "weighted", [b])
        return out * torch_ops.torch.ops.kvarn.rotate(q)

    with FakeTensorMode():
        called = traced(step, *fake_step())
    assert called == ["plan", "append", "attend", "pack", "rotate"]
