"""`python -m benchmarks.training_step`: a whole training step of ours beside the same network in plain PyTorch.

Also the loader's share of the step and the time from start to first step. Writes results/training_step.json.
"""

from __future__ import annotations

import argparse
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import reporting
from fastcifar import data, models, native


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


def plain_ds_resnet() -> nn.Module:
    """ds_resnet without anything of fastcifar."""
    layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(inplace=True)]
    inputs = 32
    for outputs, stride in zip((32, 64, 96, 128), (1, 2, 2, 2), strict=True):
        layers.append(PlainBlock(inputs, outputs, stride))
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 100))


def step_of(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, amp: bool) -> Callable[[], None]:
    """A function that trains on one batch."""
    model = model.to(images.device, memory_format=torch.channels_last)
    optimiser = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, nesterov=True, fused=True)

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimiser.step()

    return step


def start_up_seconds() -> float:
    """From launching the interpreter to the first step's end, with the synthetic images."""
    code = (
        "import torch; from fastcifar import data; from fastcifar.training import recipe, distributed; "
        "from fastcifar.training.classify import Classification; d = data.load_dataset('synthetic'); "
        "r = recipe.with_budget(recipe.resolve({'steps': 1}, has_gpu=False), len(d.train_images)); "
        "Classification(r, d, torch.device('cpu'), distributed.Processes()).train_step(0)"
    )
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - started


def peak_memory(what: str, batch_size: int, amp: bool) -> float | None:
    """MiB that two training steps of a new process add to what network and batch take; None where unknown."""
    code = (
        "import re, pathlib, torch; from fastcifar import models, native; from benchmarks import training_step as t; "
        "native.tune_allocator(); "
        f"images = torch.randn({batch_size}, 3, 32, 32).contiguous(memory_format=torch.channels_last); "
        f"labels = torch.zeros({batch_size}, dtype=torch.int64); "
        f"model = t.plain_ds_resnet() if {what!r} == 'plain' else models.create_model('ds_resnet', impl={what!r}); "
        f"t.step_of(model, images[:2], labels[:2], {amp})(); step = t.step_of(model, images, labels, {amp}); "
        "status = pathlib.Path('/proc/self/status'); pathlib.Path('/proc/self/clear_refs').write_text('5'); "
        "kib = lambda key: int(re.search(key + r':\\s+(\\d+)', status.read_text())[1]); "
        "before = kib('VmRSS'); step(); step(); print((kib('VmHWM') - before) / 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return float(done.stdout) if done.returncode == 0 else None


def synthetic_loader(batch_size: int, dtype: torch.dtype) -> data.ResidentLoader:
    """Augmented batches of the synthetic images."""
    made = data.load_dataset("synthetic")
    return data.ResidentLoader(
        made.train_images,
        made.train_labels,
        batch_size=batch_size,
        num_classes=100,
        mean=made.mean,
        std=made.std,
        dtype=dtype,
        augmentation=data.Augmentation(crop_pad=4, hflip="alternating"),
    )


def main() -> None:
    """Measures, prints a table and writes the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_step", description=__doc__)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--amp-dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--compile", action="store_true", help="also torch.compile of the plain network")
    parser.add_argument("--output", type=pathlib.Path, help="folder of the JSON")
    options = parser.parse_args()
    amp = options.amp_dtype == "bf16"
    tuned = native.tune_allocator()
    loader = synthetic_loader(options.batch_size, torch.bfloat16 if amp else torch.float32)
    batch = loader.batch(0)
    images = batch.images.float().contiguous(memory_format=torch.channels_last)
    alternatives = {
        "fastcifar, auto": step_of(models.create_model("ds_resnet"), images, batch.labels, amp),
        "fastcifar, reference": step_of(models.create_model("ds_resnet", impl="reference"), images, batch.labels, amp),
        "plain PyTorch, channels-last": step_of(plain_ds_resnet(), images, batch.labels, amp),
        "loader alone": lambda: loader.batch(1),
    }
    if options.compile:
        alternatives["torch.compile"] = step_of(torch.compile(plain_ds_resnet()), images, batch.labels, amp)
    seconds = reporting.interleaved(alternatives, rounds=options.rounds)
    base = seconds["plain PyTorch, channels-last"]
    rows = [
        {"what": name, "ms": 1000 * value, "images/s": options.batch_size / value, "times plain": base / value}
        for name, value in seconds.items()
    ]
    print(reporting.table(rows))
    share = 100 * seconds["loader alone"] / seconds["fastcifar, auto"]
    start_up = start_up_seconds()
    memory = {what: peak_memory(what, options.batch_size, amp) for what in ("auto", "reference", "plain")}
    print(
        "\npeak memory of a step, MiB: " + ", ".join(f"{what} {value:.0f}" for what, value in memory.items() if value)
    )
    print(f"\nloader: {share:.2f} % of the step; start to first step: {start_up:.1f} s; allocator tuned: {tuned}")
    content = {
        "batch_size": options.batch_size,
        "amp_dtype": options.amp_dtype,
        "allocator_tuned": tuned,
        "rows": rows,
        "loader_percent_of_step": share,
        "start_up_seconds": start_up,
        "peak_mib": memory,
    }
    print(reporting.save("training_step", content, options.output))


if __name__ == "__main__":
    main()
