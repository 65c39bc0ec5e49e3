"""Fair timing: alternatives in turns, phase by phase; device time on a GPU, with a cold or a warm L2 cache; memory.

A call is a plain function, timed as a whole, or a generator function that says where its phases end:

    def step():
        ...                 # preparation, not timed
        yield
        z = forward(x)
        yield "forward"     # the phase that ends here
        z.backward(dz)
        yield "backward"
"""

from __future__ import annotations

import functools
import inspect
import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# More than the L2 cache of any GPU so far.
FLUSHED_BYTES = 256 * 2**20
# Cycles of about a millisecond, in which the host queues all launches; what takes longer gets more, up to 60 ms.
LEAD_CYCLES, MOST_CYCLES = 2_000_000, 128_000_000

# Operators are timed in each of these.
L2_STATES = ("cold", "warm") if DEVICE.type == "cuda" else (None,)

Call = Callable[[], Any]


class _HostClock:
    """Wall time."""

    def begin(self, call: Call) -> None:
        self._times = [time.perf_counter()]

    def lap(self) -> None:
        self._times.append(time.perf_counter())

    def too_late(self) -> bool:
        return False

    def seconds(self) -> list[float]:
        return [last - first for first, last in itertools.pairwise(self._times)]


class _DeviceClock:
    """Time between events on the GPU. With a state of the L2 cache the GPU is kept busy while the host queues the
    work, so that launches cost nothing; without, waiting for the host counts, as in training."""

    def __init__(self, l2: str | None):
        self._l2 = l2
        self._leads: dict[Call, int] = defaultdict(lambda: LEAD_CYCLES)
        self._flushed = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device=DEVICE) if l2 == "cold" else None

    def begin(self, call: Call) -> None:
        self._call = call
        torch.cuda.synchronize()
        if self._flushed is not None:
            self._flushed.zero_()
        if self._l2 is not None:
            torch.cuda._sleep(self._leads[call])
        self._events: list[torch.cuda.Event] = []
        self.lap()

    def lap(self) -> None:
        self._events.append(torch.cuda.Event(enable_timing=True))
        self._events[-1].record()

    def too_late(self) -> bool:
        """Whether the GPU may have waited for the host, asked after the last lap; the call's next lead is then longer.

        A call that reads a result back waits whatever the lead: with the longest one its time stands.
        """
        if self._l2 is None or not self._events[0].query() or self._leads[self._call] >= MOST_CYCLES:
            return False
        self._leads[self._call] *= 4
        return True

    def seconds(self) -> list[float]:
        self._events[-1].synchronize()
        return [first.elapsed_time(last) / 1000 for first, last in itertools.pairwise(self._events)]


def _phases(call: Call) -> Iterator[str]:
    if inspect.isgeneratorfunction(call):
        yield from call()
    else:
        yield ""
        call()
        yield "whole"


def run(call: Call) -> None:
    """All phases, untimed."""
    for _ in _phases(call):
        pass


def _once(call: Call, clock: _HostClock | _DeviceClock) -> dict[str, float]:
    while True:
        phases, names = _phases(call), []
        next(phases)
        clock.begin(call)
        for name in phases:
            clock.lap()
            names.append(name)
        if not clock.too_late():
            return dict(zip(names, clock.seconds(), strict=True))


def in_turns(
    calls: Mapping[str, Call], *, rounds: int, warmup: int = 2, budget: float = float("inf"), l2: str | None = None
) -> dict[str, dict[str, list[float]]]:
    """Seconds of every phase of every call in each round, the calls in turns, so that a slow moment hits all alike.

    Args:
        calls: alternatives by name.
        rounds: at most so many; fewer, but at least three, once `budget` seconds are spent.
        warmup: rounds before these, not kept.
        budget: seconds.
        l2: on a GPU, "cold" or "warm" give device time with the L2 cache emptied before a call, or with the same call
            run just before; None gives wall time, launches included.
    """
    on_gpu = DEVICE.type == "cuda"
    clock = _DeviceClock(l2) if on_gpu else _HostClock()
    found: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in calls}
    started = time.perf_counter()
    for number in range(warmup + rounds):
        if number - warmup >= 3 and time.perf_counter() - started > budget:
            break
        for name, call in calls.items():
            if on_gpu and l2 == "warm":
                run(call)
            laps = _once(call, clock)
            if number >= warmup:
                for phase, seconds in laps.items():
                    found[name][phase].append(seconds)
    return found


def whole(phases: Mapping[str, Sequence[float]]) -> list[float]:
    """The sum of all phases, round by round."""
    return [sum(laps) for laps in zip(*phases.values(), strict=True)]


def medians(found: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, float]:
    """Median seconds of each call as a whole."""
    return {name: statistics.median(whole(phases)) for name, phases in found.items()}


def median_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """The median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def peak_mib(call: Call) -> float:
    """MiB of tensors that one call holds at most, beyond those that are there before it."""
    run(call)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(call)
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run(call)
    return _most_held(profile.profiler.kineto_results.experimental_event_tree()) / 2**20


def _most_held(events: Sequence[Any]) -> int:
    """Bytes of the largest sum of allocations that were not yet freed; what was allocated before does not count."""
    changes, pending = [], list(events)
    while pending:
        event = pending.pop()
        pending += event.children
        if event.tag == torch._C._profiler._EventType.Allocation:
            changes.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    held: dict[int, int] = {}
    now = most = 0
    for _, address, size in sorted(changes):
        if size > 0:
            held[address] = size
            now += size
        else:
            now -= held.pop(address, 0)
        most = max(most, now)
    return most


def measure(
    calls: Mapping[str, Call],
    about: Mapping[str, Any],
    refused: Mapping[str, str],
    *,
    copied: int,
    moved: Mapping[str, int],
    operations: Mapping[str, int],
    **effort: Any,
) -> tuple[list[dict[str, Any]], list[float]]:
    """Rows of every call and phase, on a GPU with a cold and a warm L2 cache, and the rounds of the first as a whole.

    Args:
        calls: by name, with the same phases; "copy", as a whole, is the ceiling.
        about: what every row begins with.
        refused: names that are not timed, and why.
        copied: bytes that the copy reads and writes.
        moved: bytes that our scheme moves, by phase and for "both": effective rates of all calls follow from these.
        operations: of the arithmetic, likewise.
        effort: options of `in_turns`.
    """
    rows = [{**about, "what": name, "refused": reason} for name, reason in refused.items()]
    peaks = {name: peak_mib(call) for name, call in calls.items()}
    product = machine()["float32 matrix product, GFLOP/s"] * 1e9
    for l2 in L2_STATES:
        found = in_turns(calls, **effort, l2=l2)
        start = {**about, "L2": l2} if l2 else dict(about)
        copy = statistics.median(found["copy"]["whole"])
        rate = copied / copy
        rows.append({**start, "what": "copy", "phase": "both", "ms": 1e3 * copy, "bytes": copied, "GB/s": rate / 1e9})
        for name in calls:
            phases = {**found[name], "both": whole(found[name])} if name != "copy" else {}
            for phase, laps in phases.items():
                seconds, floor = statistics.median(laps), max(moved[phase] / rate, operations[phase] / product)
                row = {**start, "what": name, "phase": phase, "ms": 1e3 * seconds, "floor, ms": 1e3 * floor}
                row |= {"bytes": moved[phase], "operations": operations[phase], "GB/s": moved[phase] / seconds / 1e9}
                row["% of copy rate"] = 100 * moved[phase] / seconds / rate
                rows.append(row | ({"peak, MiB": peaks[name]} if phase == "both" else {}))
    return rows, whole(found[next(iter(calls))])


@functools.cache
def machine() -> dict[str, Any]:
    """What this device can do: bytes a second of a copy, operations a second of matrix products (one batch of each).

    A copy of 32 MiB on a CPU, 1 GiB on a GPU, read and written; products of square matrices, float32 without tf32.
    """
    values, size = (2**29, 8192) if DEVICE.type == "cuda" else (2**24, 1024)
    source = torch.empty(values, dtype=torch.bfloat16, device=DEVICE).normal_()
    target = torch.empty_like(source)
    calls: dict[str, Call] = {"copy": lambda: target.copy_(source)}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        a = torch.randn(size, size, device=DEVICE).to(dtype)
        calls[name] = functools.partial(torch.mm, a, a)
    best = {name: min(whole(phases)) for name, phases in in_turns(calls, rounds=9, l2="warm").items()}
    return {
        "device": DEVICE.type,
        "copy, GB/s": 4 * values / best["copy"] / 1e9,
        "float32 matrix product, GFLOP/s": 2 * size**3 / best["float32"] / 1e9,
        "bfloat16 matrix product, GFLOP/s": 2 * size**3 / best["bfloat16"] / 1e9,
    }


_REPLAYED: Iterator[float] = iter(())


def replayed() -> float:
    """The clock of every benchmark here: pytest-benchmark reads the times that `in_turns` has measured."""
    return next(_REPLAYED)


def hand_over(benchmark: Any, seconds: Sequence[float], **extra_info: Any) -> None:
    """Gives pytest-benchmark these rounds and facts; the test's marker names `timer=timing.replayed`."""
    global _REPLAYED
    _REPLAYED = itertools.chain.from_iterable((0.0, value) for value in seconds)
    benchmark.extra_info.update(extra_info)
    benchmark.pedantic(lambda: None, rounds=len(seconds))
