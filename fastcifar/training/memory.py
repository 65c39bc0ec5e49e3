"""Running out of memory: told from other errors, with the peak and a batch size that was tried and fits."""

from __future__ import annotations

import dataclasses
import gc
import re

import torch

from fastcifar import data
from fastcifar.training import environment
from fastcifar.training.adversarial import Adversarial
from fastcifar.training.classify import Classification
from fastcifar.training.distributed import Processes
from fastcifar.training.options import Recipe

# The last is oneDNN's, whose layers need scratch memory.
_MESSAGES = re.compile(
    r"(out of|not enough) memory|(can't|cannot) allocate|ALLOC_FAILED|bad_alloc|could not create a primitive",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator of Python, the processor or the GPU gave up; torch has no one type for it."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and _MESSAGES.search(str(error)) is not None


def fitting_batch_size(task: Classification | Adversarial) -> int | None:
    """The largest of 1/2, 1/4, … of the run's batch size with which two steps succeed; None if not even one image does.

    Two, as the first one makes the optimiser's state. Trains copies; the task itself is not touched.
    """
    size = task.recipe.batch_size // 2
    while size:
        gc.collect()
        if task.device.type == "cuda":
            torch.cuda.empty_cache()
        if _fits(type(task), dataclasses.replace(task.recipe, batch_size=size), task.dataset, task.device):
            return size
        size //= 2
    return None


def _fits(
    kind: type[Classification] | type[Adversarial], recipe: Recipe, dataset: data.ImageDataset, device: torch.device
) -> bool:
    try:
        trial = kind(recipe, dataset, device, Processes())
        for step in range(2):
            trial.train_step(step)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def describe(task: Classification | Adversarial, step: int, reason: str) -> str:
    """What happened, how much memory the process has held, and what to do; one line."""
    peak = f"{environment.memory_mib(task.device):,} MiB"
    if task.device.type == "cuda":
        peak += f" of {torch.cuda.get_device_properties(task.device).total_memory / 2**20:,.0f}"
    head = f"out of memory in step {step + 1} with --batch-size {task.recipe.batch_size} on {task.device}: "
    head += f"the process held at most {peak} ({reason})"
    if task.processes.world_size > 1:
        # The other processes wait in a collective: nothing can be tried here.
        return f"{head}; use more processes, or --batch-size {task.recipe.batch_size // 2} and a new --output"
    size = fitting_batch_size(task)
    if size is None:
        return f"{head}; no half, quarter, … of it fits into what is left: use a smaller network or another --device"
    return f"{head}; --batch-size {size} was tried and fits: start anew with it and another --output"
