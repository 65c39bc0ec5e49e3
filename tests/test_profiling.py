"""NVTX ranges: what is opened is closed, in order, under the names that the documentation gives."""

import sys

import pytest
import torch
from capture_case import make
from training_case import write_tiny

from fastcifar import data, functional, profiling


class Listener:
    """A domain that remembers."""

    def __init__(self):
        self.open, self.seen = [], []

    def get_event_attributes(self, message):
        return message

    def push_range(self, name):
        self.open.append(name)
        self.seen.append("/".join(self.open))

    def pop_range(self):
        self.open.pop()


@pytest.fixture
def listener(monkeypatch):
    made = Listener()
    monkeypatch.setitem(sys.modules, "nvtx", type("nvtx", (), {"get_domain": lambda name: made}))
    profiling.enable()
    yield made
    profiling.disable()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return data.load_dataset(write_tiny(tmp_path_factory.mktemp("data") / "tiny.npz", size=32))


def test_a_step_is_ranges_of_phases(listener, tiny):
    task = make(tiny, torch.device("cpu"), model_ema_decay=0.9, model_options={"width": 0.25})
    task.train_step(0)
    assert not listener.open
    phases = ["augment", "forward", "loss", "backward", "update", "average"]
    assert listener.seen[0] == "place"
    assert [n.removeprefix("step/") for n in listener.seen if n.count("/") == 1 and "place" not in n] == phases


def test_a_gan_step_is_ranges_of_its_two_networks(listener, tiny):
    task = make(tiny, torch.device("cpu"), model="aw_sngan", model_options={"width": 4, "latent_dim": 8})
    task.train_step(0)
    assert not listener.open
    assert [n for n in listener.seen if n.count("/") == 1] == ["step/discriminator", "step/generator"]


def test_an_operator_is_a_range(listener):
    x = torch.randn(2, 8, 5, 5, requires_grad=True)
    weight = torch.randn(8, 1, 3, 3, requires_grad=True)
    z = functional.depthwise_conv_bn_act(x, weight, None, None, padding=1, training=True, impl="triton")
    z.sum().backward()
    assert {"depthwise_statistics", "depthwise_reduce"} <= set(listener.seen) and not listener.open


def test_an_error_closes_its_ranges(listener):
    @profiling.annotated("fails")
    def fails():
        with profiling.annotate("inside"):
            raise KeyError("x")

    with pytest.raises(KeyError):
        fails()
    assert listener.seen == ["fails", "fails/inside"] and not listener.open


def test_ranges_are_off_until_asked_for(tiny):
    assert not profiling.enabled()
    entered = profiling.annotate("a")
    assert entered is profiling.annotate("b")  # nothing is made
    with entered:
        pass


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvtx", None)
    with pytest.raises(ValueError, match="pip install nvtx"):
        profiling.enable()
    assert not profiling.enabled()


def test_the_real_package_takes_them():
    pytest.importorskip("nvtx")
    profiling.enable()
    try:
        with profiling.annotate("step"):
            assert profiling.enabled()
    finally:
        profiling.disable()
