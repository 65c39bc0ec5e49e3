"""Device times hold no waiting for the host."""

import pytest
import torch

from benchmarks import timing


class Device:
    """A GPU that works through its queue while the host's clock goes on, in seconds; a cycle is a nanosecond."""

    def __init__(self):
        self.now = self.busy_until = 0.0

    def work(self, host, device):
        """The host takes so long to launch what the device takes so long to do."""
        self.now += host
        self.busy_until = max(self.now, self.busy_until) + device

    def event(self, enable_timing):
        return Event(self)


class Event:
    def __init__(self, device):
        self.device = device

    def record(self):
        self.time = max(self.device.now, self.device.busy_until)

    def query(self):
        return self.time <= self.device.now

    def synchronize(self):
        self.device.now = max(self.device.now, self.time)

    def elapsed_time(self, other):
        return 1e3 * (other.time - self.time)


@pytest.fixture
def device(monkeypatch):
    device = Device()
    monkeypatch.setattr(timing, "DEVICE", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: device.work(0.0, 1e-9 * cycles))
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    return device


def test_a_call_that_the_host_launches_slowly_gets_a_longer_lead(device):
    starts = []

    def slow():
        yield
        for phase in ("forward", "backward"):
            starts.append(device.now)
            for _ in range(10):
                device.work(1e-3, 1e-5)
            yield phase

    def waiting():
        device.work(1e-4, 1e-5)
        device.now = max(device.now, device.busy_until) + 2e-3
        device.work(1e-4, 1e-5)

    calls = {"slow": slow, "fast": lambda: device.work(1e-5, 1e-5), "waiting": waiting}
    found = timing.in_turns(calls, rounds=4, warmup=0, l2="warm")
    assert found["slow"]["forward"] == pytest.approx([1e-4] * 4)
    assert found["slow"]["backward"] == pytest.approx([1e-4] * 4)
    # Each round runs it to warm the cache and to time it; the first one also with the leads that were too short.
    assert len(starts) == 2 * (4 * 2 + 2)
    assert found["fast"]["whole"] == pytest.approx([1e-5] * 4)
    assert all(seconds > 2e-3 for seconds in found["waiting"]["whole"])


@pytest.mark.gpu
@pytest.mark.parametrize("l2", ["cold", "warm"])
def test_work_of_the_host_does_not_count(l2):
    x = torch.zeros(1, device="cuda")

    def call():
        sum(range(2**19))
        x.add_(1)

    found = timing.in_turns({"call": call}, rounds=5, l2=l2)
    # The host's part takes several; others may use this GPU, too.
    assert min(found["call"]["whole"]) < 1e-3
