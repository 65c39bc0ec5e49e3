"""Captured steps equal uncaptured ones to the bit."""

import pytest
import torch
from capture_case import CASES, make, values_after
from training_case import write_tiny

from fastcifar import data
from fastcifar.training import checkpoint
from fastcifar.training.capture import StepGraph

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return data.load_dataset(write_tiny(tmp_path_factory.mktemp("data") / "tiny.npz", size=32))


@pytest.fixture
def deterministic():
    """PyTorch's own operators give the same bits each time, where they can."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_a_captured_run_equals_an_uncaptured_one(options, tiny, deterministic):
    captured, plain = (make(tiny, DEVICE, cuda_graph=graph, **options) for graph in (True, False))
    found, expected = values_after(captured, 8), values_after(plain, 8)
    assert captured.graph.captured and captured.graph.failure is None and plain.graph is None
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name
    assert captured.take_averages() == plain.take_averages()


def test_a_resumed_run_is_captured_anew(tiny, tmp_path, deterministic):
    first, second = (make(tiny, DEVICE, cuda_graph=True) for _ in range(2))
    values_after(first, 6)
    saved = checkpoint.load(checkpoint.save(tmp_path, 6, *first.state()))
    values_after(second, 5)
    second.load_state(saved)
    assert not second.graph.captured
    for step in range(6, 12):
        first.train_step(step)
        second.train_step(step)
    assert second.graph.captured
    assert checkpoint.state_sha256(second.state()[0]) == checkpoint.state_sha256(first.state()[0])


def test_steps_before_the_capture_share_a_stream():
    streams = []
    step = StepGraph(lambda: streams.append(torch.cuda.current_stream(DEVICE)), DEVICE)
    for _ in range(3):
        step()
    step.reset()
    step()
    assert len(streams) == 4 and len(set(streams)) == 1 and streams[0] != torch.cuda.current_stream(DEVICE)
