"""A process of `benchmarks.scaling`: waits for commands, and answers with what it measured."""

from __future__ import annotations

import collections
import contextlib
import statistics
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

from fastcifar.data.synthetic import synthetic
from fastcifar.training import recipe
from fastcifar.training.adversarial import Adversarial
from fastcifar.training.classify import Classification
from fastcifar.training.distributed import Processes

TASKS: dict[str, dict[str, Any]] = {
    "ds_resnet": {"model": "ds_resnet"},
    "ds_resnet, local statistics": {"model": "ds_resnet", "sync_bn": False},
    "ds_resnet, local, sharded images": {"model": "ds_resnet", "sync_bn": False, "data_placement": "sharded"},
    "aw_sngan": {"model": "aw_sngan", "n_dis": 1, "diffaugment": "off"},
    "dcgan": {"model": "dcgan"},
}
KINDS = {"all_reduce": "all_reduce", "all_gather": "all_gather", "all_to_all_single": "all_to_all"}


def build(name: str, images: int, processes: Processes, **options: Any) -> Classification | Adversarial:
    """A task of that name with so many images for each process, in float32 on the CPU."""
    settings = {**TASKS[name], "batch_size": images * processes.world_size, "steps": 10_000, "amp_dtype": "fp32"}
    chosen = recipe.with_budget(recipe.resolve({**settings, **options}, has_gpu=False), 1024)
    kind = Classification if chosen.model == "ds_resnet" else Adversarial
    return kind(chosen, synthetic(1024, 100), torch.device("cpu"), processes)


@contextlib.contextmanager
def recorded() -> Iterator[list[tuple[str, str, int]]]:
    """Notes each collective: kind, dtype and the bytes that this process puts in."""
    calls: list[tuple[str, str, int]] = []
    with contextlib.ExitStack() as stack:
        for name, kind in KINDS.items():
            original = getattr(dist, name)

            def call(*arguments: Any, _original: Any = original, _kind: str = kind, **options: Any) -> Any:
                tensor = arguments[0] if _kind == "all_reduce" else arguments[1]
                calls.append((_kind, str(tensor.dtype).removeprefix("torch."), tensor.numel() * tensor.itemsize))
                return _original(*arguments, **options)

            stack.enter_context(mock.patch.object(dist, name, call))
        yield calls


def collectives_of(task: Classification | Adversarial) -> list[dict[str, Any]]:
    """The collectives of one step after the first: rows of kind, dtype, bytes of a call, calls."""
    forward = getattr(task, "_forward", None)
    if isinstance(forward, torch.nn.parallel.DistributedDataParallel):
        # What it does by itself, but through torch.distributed's function.
        forward.register_comm_hook(None, default_hooks.allreduce_hook)
    task.train_step(0)
    with recorded() as calls:
        task.train_step(1)
    counted = collections.Counter(calls)
    return [
        {"kind": kind, "dtype": dtype, "bytes": size, "calls": count}
        for (kind, dtype, size), count in sorted(counted.items())
    ]


class Worker:
    """The tasks that one process holds, and what can be asked of it."""

    def __init__(self, processes: Processes):
        self.processes = processes
        self.tasks: dict[tuple, Classification | Adversarial] = {}

    def count(self, name: str, images: int) -> list[dict[str, Any]]:
        """The collectives of a step."""
        return collectives_of(build(name, images, self.processes))

    def steps(self, name: str, images: int, together: bool, count: int) -> float:
        """Median seconds of a step, after one that is not timed; `together` with the other processes, or each alone."""
        key = name, images, together
        if key not in self.tasks:
            self.tasks[key] = build(name, images, self.processes if together else Processes())
        times = []
        self._meet()
        for number in range(count + 1):
            started = time.perf_counter()
            self.tasks[key].train_step(number)
            times.append(time.perf_counter() - started)
        return statistics.median(times[1:])

    def collective(self, kind: str, size: int, count: int) -> float:
        """Median seconds of a collective into which each process puts `size` bytes."""
        own, ranks = torch.ones(size // 4), self.processes.world_size
        parts = [torch.empty_like(own) for _ in range(ranks)]
        run = {
            "all_reduce": lambda: dist.all_reduce(own),
            "all_gather": lambda: dist.all_gather(parts, own),
            "all_to_all": lambda: dist.all_to_all_single(torch.empty_like(own), own),
        }[kind]
        times = []
        self._meet()
        for _ in range(count + 2):
            started = time.perf_counter()
            run()
            times.append(time.perf_counter() - started)
            own.fill_(1.0)
        return statistics.median(times[2:])

    def _meet(self) -> None:
        if self.processes.world_size > 1:
            dist.barrier()


def serve(pipe: Connection, rank: int, world_size: int, port: int) -> None:
    """Obeys commands (name of a method of `Worker`, arguments) until None."""
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    worker = Worker(Processes(rank, world_size, rank))
    while (command := pipe.recv()) is not None:
        name, arguments = command
        pipe.send(getattr(worker, name)(*arguments))
    if world_size > 1:
        dist.destroy_process_group()
