"""A training step as one CUDA graph: what it takes from the host, its capture and its replay."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch

from fastcifar.profiling import annotate
from fastcifar.training.options import Recipe

# Steps before the capture: they compile kernels, fill caches and make the optimiser's state.
_WARM_UP = 3
Values = TypeVar("Values", bound=tuple)


class Feed:
    """What a step takes from the host, by name.

    A captured step reads tensors at the addresses that they had at its capture, so a static feed keeps one tensor for
    each name and copies into it. Otherwise values stay what they are.

    Args:
        device: of the tensors.
        static: keep addresses.
    """

    def __init__(self, device: torch.device, *, static: bool):
        self.device, self.static = device, static
        self._values: dict[str, torch.Tensor | float | int] = {}

    def put(self, name: str, value: torch.Tensor) -> None:
        """A tensor on any device; the same shape and dtype each time, where static."""
        if not self.static:
            self._values[name] = value.to(self.device)
            return
        if name not in self._values:
            self._values[name] = torch.empty_like(value, device=self.device)
        pinned = value.pin_memory() if self.device.type == "cuda" and value.device.type == "cpu" else value
        self._values[name].copy_(pinned, non_blocking=True)

    def put_all(self, prefix: str, values: NamedTuple) -> None:
        """The tensors of a named tuple, for `take`."""
        for name, value in values._asdict().items():
            if value is not None:
                self.put(f"{prefix}.{name}", value)

    def take(self, prefix: str, kind: type[Values]) -> Values:
        """The named tuple of that prefix, None for what it lacked."""
        return kind(*(self._values.get(f"{prefix}.{name}") for name in kind._fields))

    def number(self, name: str, value: float | int) -> None:
        """A number: a tensor [] where static, float32 or int64."""
        if not self.static:
            self._values[name] = value
            return
        if name not in self._values:
            dtype = torch.int64 if isinstance(value, int) else torch.float32
            self._values[name] = torch.empty((), dtype=dtype, device=self.device)
        self._values[name].fill_(value)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._values[name]


class StepGraph:
    """Runs a function of static tensors: a few times as it is, then captured in a CUDA graph and replayed.

    Nothing runs twice: the first calls are steps like all others, and a capture runs nothing. When it fails, `failure`
    says why and all further calls run the function as it is.

    Args:
        compute: takes and returns nothing; launches the same work on the same addresses at every call.
        device: a CUDA device.
    """

    def __init__(self, compute: Callable[[], None], device: torch.device):
        self._compute, self._device = compute, device
        self.failure: str | None = None
        self._side: torch.cuda.Stream | None = None
        self.reset()

    @property
    def captured(self) -> bool:
        """Whether calls replay the graph."""
        return self._graph is not None

    def reset(self) -> None:
        """Forgets the graph; for when tensors have moved."""
        self._graph: torch.cuda.CUDAGraph | None = None
        self._runs = 0

    def __call__(self) -> None:
        if self._graph is not None:
            self._graph.replay()
        elif self.failure is not None:
            self._compute()
        elif self._runs < _WARM_UP:
            self._runs += 1
            self._warm_up()
        elif self._capture():
            self._graph.replay()
        else:
            self._compute()

    def _warm_up(self) -> None:
        """On another stream, as the capture will be; always the same one, as the allocator keeps memory by stream."""
        current = torch.cuda.current_stream(self._device)
        if self._side is None:
            self._side = torch.cuda.Stream(self._device)
        self._side.wait_stream(current)
        with torch.cuda.stream(self._side):
            self._compute()
        current.wait_stream(self._side)

    def _capture(self) -> bool:
        graph = torch.cuda.CUDAGraph()
        try:
            with annotate("capture"), torch.cuda.graph(graph):
                self._compute()
        except RuntimeError as error:
            self.failure = " ".join(str(error).split())[:200]
            return False
        self._graph = graph
        return True


def build_graph(
    compute: Callable[[], None], device: torch.device, recipe: Recipe, amp_dtype: torch.dtype, processes: int
) -> tuple[StepGraph | None, str | None]:
    """The graph of a step, or None; and what the user must know: why there is none though one was to be expected."""
    if recipe.cuda_graph is False:
        return None, None
    why = _obstacle(device, recipe, amp_dtype, processes)
    if why is None:
        return StepGraph(compute, device), None
    expected = recipe.cuda_graph or device.type == "cuda"
    return None, f"steps are not captured in a CUDA graph: {why}" if expected else None


def _obstacle(device: torch.device, recipe: Recipe, amp_dtype: torch.dtype, processes: int) -> str | None:
    if device.type != "cuda":
        return f"that needs a CUDA device, the run is on {device}"
    if processes > 1:
        return f"graphs hold no communication here, and {processes} processes communicate"
    if amp_dtype == torch.float16:
        return "the loss scale of fp16 changes on the host; bf16 needs none"
    if recipe.compile:
        return "--compile makes graphs of its own"
    return None
