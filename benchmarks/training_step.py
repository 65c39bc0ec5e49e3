"""Whole training steps: networks as one would write them in plain PyTorch, the step itself, and what surrounds it."""

from __future__ import annotations

import copy
import functools
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import agreement, timing
from benchmarks.timing import DEVICE
from fastcifar import data
from fastcifar.training import distributed, recipe
from fastcifar.training.adversarial import Adversarial
from fastcifar.training.classify import Classification


class PlainBlock(nn.Module):
    """The residual block of ds_resnet out of torch.nn layers, as one would write it."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.body = nn.Sequential(*self._separable(inputs, outputs, stride), *self._separable(outputs, outputs, 1)[:-1])
        changes = stride != 1 or inputs != outputs
        self.shortcut = (
            nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
            if changes
            else nn.Identity()
        )

    @staticmethod
    def _separable(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        return [
            nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False),
            nn.BatchNorm2d(inputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(inputs, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        ]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.body(x) + self.shortcut(x), inplace=True)


def plain_ds_resnet(width: int = 1) -> nn.Module:
    """ds_resnet without anything of fastcifar; width 2 is ds_resnet_x2."""
    stem, *stages = (width * channels for channels in (32, 32, 64, 96, 128))
    layers: list[nn.Module] = [nn.Conv2d(3, stem, 3, 1, 1, bias=False), nn.BatchNorm2d(stem), nn.ReLU(inplace=True)]
    inputs = stem
    for outputs, stride in zip(stages, (1, 2, 2, 2), strict=True):
        layers.append(PlainBlock(inputs, outputs, stride))
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 100))


class Step:
    """Training of one network on one batch, autocast to bfloat16; SGD with Nesterov momentum.

    Args:
        model: of any layout; it is moved to the images' device and to `layout`.
        images: [N, 3, H, W]; float64 for a step without autocast.
        labels: [N].
        layout: of network and images.
        compiled: options of torch.compile for the network, None: not compiled.
    """

    def __init__(
        self,
        model: nn.Module,
        images: torch.Tensor,
        labels: torch.Tensor,
        *,
        layout: torch.memory_format = torch.channels_last,
        compiled: dict | None = None,
    ):
        self.model = model.to(images.device, memory_format=layout)
        self.images, self.labels = images.contiguous(memory_format=layout), labels
        self._forward = self.model if compiled is None else torch.compile(self.model, **compiled)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self._optimiser = torch.optim.SGD(parameters, 0.01, momentum=0.9, nesterov=True, fused=True)

    def step(self) -> Iterator[str]:
        """One step, for `timing.in_turns`."""
        self._optimiser.zero_grad(set_to_none=True)
        if self._forward is not self.model:
            torch.compiler.cudagraph_mark_step_begin()
        yield ""
        loss = self._loss()
        yield "forward"
        loss.backward()
        yield "backward"
        self._optimiser.step()
        yield "optimiser"

    def results(self, count: int) -> list[torch.Tensor]:
        """The loss of the first images, and the gradient of all parameters as one vector, float64."""
        self._optimiser.zero_grad(set_to_none=True)
        loss = self._loss(count)
        loss.backward()
        gradients = [p.grad.flatten() for p in self.model.parameters()]
        return [loss.detach().double(), torch.cat(gradients).double()]

    def _loss(self, count: int | None = None) -> torch.Tensor:
        with torch.autocast(self.images.device.type, torch.bfloat16, enabled=self.images.dtype != torch.float64):
            return F.cross_entropy(self._forward(self.images[:count]), self.labels[:count])


def compare(
    original: nn.Module,
    ours: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    compiled: Mapping[str, dict],
    checked: int,
    others: Mapping[str, timing.Call] | None = None,
    **effort: Any,
) -> tuple[list[dict[str, Any]], list[float]]:
    """Rows of a step of ours, of the original in both layouts, and of it compiled; and the rounds of ours.

    Args:
        original, ours: networks with the same parameters in the same order; ours takes the original's values.
        images: [N, 3, H, W].
        labels: [N].
        compiled: options of torch.compile by the name of the row.
        checked: so many images must give the loss and the gradients of float64.
        others: further steps for the same number of images, which are timed as they are.
        effort: options of `timing.in_turns`.

    Raises:
        ArithmeticError: ours does not agree with float64; nothing was timed.
    """
    with torch.no_grad():
        for mine, theirs in zip(ours.parameters(), original.parameters(), strict=True):
            mine.copy_(theirs)
    exact = Step(copy.deepcopy(original).double(), images[:checked].double(), labels[:checked]).results(checked)
    steps = {"ours": Step(ours, images, labels), "eager": Step(copy.deepcopy(original), images, labels)}
    steps["eager, contiguous"] = Step(copy.deepcopy(original), images, labels, layout=torch.contiguous_format)
    for name, options in compiled.items():
        steps[name] = Step(copy.deepcopy(original), images, labels, compiled=options)
    results = {name: functools.partial(step.results, checked) for name, step in steps.items()}
    refused = agreement.refused(results, exact, eager="eager", ours="ours", eps=torch.finfo(torch.bfloat16).eps)
    calls = {name: step.step for name, step in steps.items() if name not in refused}
    calls |= others or {}
    found = timing.in_turns(calls, **effort)
    rows = [{"what": name, "refused": reason} for name, reason in refused.items()]
    for name, phases in found.items():
        seconds = statistics.median(timing.whole(phases))
        row = {"what": name, "ms": 1e3 * seconds, "images/s": len(images) / seconds}
        row |= {f"{phase}, ms": 1e3 * statistics.median(laps) for phase, laps in phases.items() if phase != "whole"}
        rows.append(row | {"peak, MiB": timing.peak_mib(calls[name])})
    return rows, timing.whole(found["ours"])


def engine_step(model: str, batch_size: int) -> timing.Call:
    """A step of the training engine with its loader, on a GPU captured in a CUDA graph."""
    options = {"model": model, "preset": "fast", "batch_size": batch_size, "steps": 10_000}
    made = dataset()
    chosen = recipe.with_budget(recipe.resolve(options, has_gpu=DEVICE.type == "cuda"), len(made.train_images))
    return steps_of(Classification(chosen, made, DEVICE, distributed.Processes()))


def steps_of(task: Classification | Adversarial) -> timing.Call:
    """One step of a task after the other; on a GPU it is captured by then."""
    number = itertools.count()
    for _ in range(5 if DEVICE.type == "cuda" else 0):
        task.train_step(next(number))
    return lambda: task.train_step(next(number))


def parts(step: Step, rounds: int = 5) -> dict[str, float]:
    """Seconds of a step in the fused operators, in convolutions and in everything else, by torch.profiler.

    On a CPU also what the profiler itself costs; on a GPU what the kernels take.
    """
    activity = torch.profiler.ProfilerActivity
    on_gpu = DEVICE.type == "cuda"
    timing.run(step.step)
    with torch.profiler.profile(activities=[activity.CPU, *([activity.CUDA] if on_gpu else [])]) as profile:
        for _ in range(rounds):
            timing.run(step.step)
    found = {"fused operators": 0.0, "convolutions": 0.0, "everything else": 0.0}
    for event in profile.key_averages():
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue  # a kernel, which counts where it was launched
        is_ours = event.key.startswith("fastcifar::")
        part = "fused operators" if is_ours else "convolutions" if "convolution" in event.key else "everything else"
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        found[part] += microseconds / 1e6 / rounds
    return found


def start_up_seconds() -> float:
    """From launching the interpreter to the first step's end, with the synthetic images."""
    code = (
        "import torch; from fastcifar import data; from fastcifar.training import recipe, distributed; "
        "from fastcifar.training.classify import Classification; d = data.load_dataset('synthetic'); "
        "gpu = torch.cuda.is_available(); "
        "r = recipe.with_budget(recipe.resolve({'steps': 1}, has_gpu=gpu), len(d.train_images)); "
        "Classification(r, d, torch.device('cuda' if gpu else 'cpu'), distributed.Processes()).train_step(0)"
    )
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - started


@functools.cache
def dataset() -> data.ImageDataset:
    """The synthetic images."""
    return data.load_dataset("synthetic")


def loader(batch_size: int, dtype: torch.dtype) -> data.ResidentLoader:
    """Augmented batches of the synthetic images."""
    made = dataset()
    return data.ResidentLoader(
        made.train_images,
        made.train_labels,
        batch_size=batch_size,
        num_classes=100,
        mean=made.mean,
        std=made.std,
        device=DEVICE,
        dtype=dtype,
        augmentation=data.Augmentation(crop_pad=4, hflip="alternating"),
    )
