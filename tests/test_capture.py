"""A step as a CUDA graph: everything around the capture, on a CPU; the capture itself is in test_capture_gpu.py."""

import contextlib

import pytest
import torch
from capture_case import CASES, make, values_after
from torch.utils._python_dispatch import TorchDispatchMode
from training_case import write_tiny

from fastcifar import data
from fastcifar.training import capture, distributed, recipe
from fastcifar.training.capture import Feed, StepGraph

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return data.load_dataset(write_tiny(tmp_path_factory.mktemp("data") / "tiny.npz", size=32))


class NothingFromTheHost(TorchDispatchMode):
    """Refuses what a captured step cannot do: read a device's value, or make a random number outside a generator."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        assert function not in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.masked_select.default,
        ), f"{function} waits for the device"
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_the_work_of_a_step_reads_the_feed_alone(options, tiny):
    task = make(tiny, CPU, **options)
    task.feed = Feed(CPU, static=True)
    task.place(0)
    addresses = {name: value.data_ptr() for name, value in task.feed._values.items()}
    with NothingFromTheHost():
        task.compute()
    task.place(1)
    with NothingFromTheHost():
        task.compute()
    assert {name: value.data_ptr() for name, value in task.feed._values.items()} == addresses
    # The same as steps that take numbers from the host, but for the rounding of rates to float32.
    expected = values_after(make(tiny, CPU, **options), 2)
    for name, value in task.network_tensors().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=name)


class FakeGraph:
    """What `torch.cuda.graph` records, as a list of functions."""

    recording = None

    def __init__(self):
        self.work = []

    def replay(self):
        for function in self.work:
            function()


@pytest.fixture
def fake_cuda(monkeypatch):
    """The calls of torch.cuda that a capture makes, without a GPU; recorded work does not run."""

    class Stream:
        def __init__(self, device=None):
            pass

        def wait_stream(self, other):
            pass

    @contextlib.contextmanager
    def graph(target):
        FakeGraph.recording = target
        try:
            yield
        finally:
            FakeGraph.recording = None

    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())


def counted(calls, error=None):
    def work():
        calls.append("run")

    def compute():
        if FakeGraph.recording is None:
            work()
        elif error is not None:
            raise error
        else:
            FakeGraph.recording.work.append(work)

    return compute


def test_every_call_is_one_step_and_later_ones_are_replays(fake_cuda):
    calls = []
    step = StepGraph(counted(calls), CPU)
    for number in range(1, 8):
        step()
        assert len(calls) == number and step.captured == (number > 3)
    step.reset()
    step()
    assert len(calls) == 8 and not step.captured and step.failure is None


def test_a_capture_that_fails_costs_no_step(fake_cuda):
    calls = []
    step = StepGraph(counted(calls, RuntimeError("operation not permitted\nwhen stream is capturing")), CPU)
    for number in range(1, 7):
        step()
        assert len(calls) == number
    assert not step.captured and step.failure == "operation not permitted when stream is capturing"


def test_a_static_feed_keeps_its_addresses():
    feed = Feed(CPU, static=True)
    feed.put("images", torch.arange(3))
    feed.number("rate", 0.5)
    feed.number("step", 2**40)
    images, rate, step = feed["images"], feed["rate"], feed["step"]
    assert rate.dtype == torch.float32 and step.dtype == torch.int64
    feed.put("images", torch.arange(3) + 7)
    feed.number("rate", 0.25)
    feed.number("step", 2**40 + 1)
    assert images.tolist() == [7, 8, 9] and float(rate) == 0.25 and int(step) == 2**40 + 1
    plain = Feed(CPU, static=False)
    plain.number("rate", 0.1)
    assert plain["rate"] == 0.1


CUDA = torch.device("cuda", 0)
REASONS = {
    "no GPU": (CPU, {"cuda_graph": True}, torch.bfloat16, 1, "needs a CUDA device, the run is on cpu"),
    "ranks": (CUDA, {}, torch.bfloat16, 2, "2 processes communicate"),
    "fp16": (CUDA, {}, torch.float16, 1, "loss scale of fp16"),
    "compiled": (CUDA, {"compile": True}, torch.bfloat16, 1, "--compile makes graphs"),
}


@pytest.mark.parametrize(("device", "options", "dtype", "ranks", "words"), REASONS.values(), ids=REASONS.keys())
def test_what_is_not_captured_says_why(device, options, dtype, ranks, words):
    chosen = recipe.resolve(options, has_gpu=False)
    graph, notice = capture.build_graph(print, device, chosen, dtype, ranks)
    assert graph is None and words in notice
    quiet = recipe.resolve({**options, "cuda_graph": False}, has_gpu=False)
    assert capture.build_graph(print, device, quiet, dtype, ranks) == (None, None)


def test_a_single_gpu_captures_by_default_and_a_cpu_says_nothing():
    chosen = recipe.resolve({}, has_gpu=False)
    assert isinstance(capture.build_graph(print, CUDA, chosen, torch.bfloat16, 1)[0], StepGraph)
    assert capture.build_graph(print, CPU, chosen, torch.bfloat16, 1) == (None, None)


def test_resuming_forgets_the_graph(tiny, tmp_path, fake_cuda):
    from fastcifar.training import checkpoint

    task = make(tiny, CPU)
    saved = checkpoint.load(checkpoint.save(tmp_path, 0, *task.state()))
    task.graph = StepGraph(task.compute, CPU)
    task.graph._graph = FakeGraph()
    task.load_state(saved)
    assert not task.graph.captured
    assert isinstance(task.processes, distributed.Processes)
