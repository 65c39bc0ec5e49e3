"""A profile of a few training steps: a trace for a viewer, and the operators by time with the bytes that they move."""

from __future__ import annotations

import pathlib
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fastcifar import profiling

# The step that is counted, after those that compile and fill caches, and the steps that are timed after it.
_FIRST, _STEPS = 5, 3
_SHOWN = 20
_COPIED = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}


class _Ranges:
    """Ranges of `fastcifar.profiling` as ranges of torch's profiler."""

    def __init__(self) -> None:
        self._open: list[torch.profiler.record_function] = []

    def get_event_attributes(self, message: str) -> str:
        return message

    def push_range(self, name: str) -> None:
        self._open.append(torch.profiler.record_function(name))
        self._open[-1].__enter__()

    def pop_range(self) -> None:
        self._open.pop().__exit__(None, None, None)


class _Counting(TorchDispatchMode):
    """Calls of operators by name, and the bytes of the tensors that go in and come out, each once a call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        name = function._schema.name
        self.calls[name] += 1
        # A view moves nothing.
        if not function.is_view:
            self.bytes[name] += _size((arguments, options, result))
        return result


def _size(values: Any) -> int:
    """Bytes of all tensors in a structure; one that is written in place is in it once."""
    found = {
        (t.data_ptr(), t.shape): t.numel() * t.element_size()
        for t in _pytree.tree_leaves(values)
        if isinstance(t, torch.Tensor)
    }
    return sum(found.values())


def copy_rate(device: torch.device) -> float:
    """Bytes a second, read and written, of the best of ten plain copies."""
    source = torch.ones(_COPIED[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(10):
        _wait(device)
        started = time.perf_counter()
        target.copy_(source)
        _wait(device)
        best = min(best, time.perf_counter() - started)
    return 2 * source.numel() / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class StepProfile:
    """Passes steps on to a task and profiles a few of them, uncaptured; `report` is the table once that is done.

    Args:
        task: what is trained; its steps are `place(step)` and `compute()`.
        folder: gets `trace.json` and `operators.txt`.
    """

    def __init__(self, task: Any, folder: pathlib.Path):
        self._task, self._folder, self._seen = task, folder, 0
        self._counting = _Counting()
        self._profiler: torch.profiler.profile | None = None
        self.report: str | None = None

    def train_step(self, step: int) -> None:
        """One step of the task."""
        number, self._seen = self._seen - _FIRST, self._seen + 1
        if number == 0:
            with self._counting:
                self._run(step)
        elif 0 < number <= _STEPS:
            self._timed(step, first=number == 1, last=number == _STEPS)
        else:
            self._task.train_step(step)

    def _run(self, step: int) -> None:
        with profiling.annotate("place"):
            self._task.place(step)
        with profiling.annotate("step"):
            self._task.compute()

    def _timed(self, step: int, *, first: bool, last: bool) -> None:
        device = self._task.device
        if first:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._nvtx = profiling.enabled()
            profiling.enable(_Ranges())
            self._profiler = torch.profiler.profile(activities=activities)
            self._profiler.start()
            self._started = time.perf_counter()
        self._run(step)
        if last:
            _wait(device)
            seconds = (time.perf_counter() - self._started) / _STEPS
            self._profiler.stop()
            profiling.disable()
            if self._nvtx:
                profiling.enable()
            self._write(seconds)

    def _write(self, seconds: float) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._profiler.export_chrome_trace(str(self._folder / "trace.json"))
        device = self._task.device
        operators = {*self._counting.calls, *profiling.OPERATORS}
        times = _times(self._profiler.events(), operators, device.type == "cuda")
        rows = _rows(times, self._counting, seconds, copy_rate(device))
        text = _table(rows)
        (self._folder / "operators.txt").write_text(text + "\n", encoding="utf-8")
        self._profiler = None
        self.report = f"{text}\nprofile of {_STEPS} steps: {self._folder}/trace.json (open at ui.perfetto.dev)"


def _times(events: Iterable[Any], operators: set[str], on_device: bool) -> dict[str, tuple[float, float]]:
    """Calls and seconds a step of each operator; what one calls is counted with it."""
    found: dict[str, tuple[float, float]] = {}
    for event in events:
        if event.name not in operators:
            continue
        above = event.cpu_parent
        while above is not None and above.name not in operators:
            above = above.cpu_parent
        if above is None:
            calls, seconds = found.get(event.name, (0.0, 0.0))
            taken = event.device_time_total if on_device else event.cpu_time_total
            found[event.name] = (calls + 1 / _STEPS, seconds + taken * 1e-6 / _STEPS)
    return found


def _rows(
    times: dict[str, tuple[float, float]], counting: _Counting, seconds: float, rate: float
) -> list[tuple[str, ...]]:
    rows = [("operator", "calls", "ms", "% of step", "MB", "GB/s", "% of copy rate")]
    ordered = sorted(times, key=lambda name: -times[name][1])
    for name in ordered[:_SHOWN]:
        calls, taken = times[name]
        # Bytes were counted for the calls that torch's dispatcher sees; ranges of our own have none.
        moved = counting.bytes[name] * calls / counting.calls[name] if counting.calls[name] else 0.0
        speed = moved / taken if taken else 0.0
        shown = (f"{moved / 1e6:.2f}", f"{speed / 1e9:.1f}", f"{100 * speed / rate:.0f}") if moved else ("–",) * 3
        rows.append((name, f"{calls:.0f}", f"{1e3 * taken:.3f}", f"{100 * taken / seconds:.1f}", *shown))
    others = sum(times[name][1] for name in ordered[_SHOWN:])
    rest = seconds - sum(taken for _, taken in times.values())
    for name, taken in ((f"{max(len(ordered) - _SHOWN, 0)} others", others), ("between operators", rest)):
        rows.append((name, "", f"{1e3 * taken:.3f}", f"{100 * taken / seconds:.1f}", "", "", ""))
    rows.append(("whole step", "", f"{1e3 * seconds:.3f}", "100.0", "", f"{rate / 1e9:.1f}", "100"))
    return rows


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for name, *cells in rows:
        numbers = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        lines.append("  ".join([name.ljust(widths[0]), *numbers]).rstrip())
    return "\n".join(lines)
