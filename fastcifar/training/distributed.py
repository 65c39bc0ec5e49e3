"""The processes of a run, as `torchrun` starts them; one process needs nothing of this."""

from __future__ import annotations

import inspect
import os
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn


@dataclass(frozen=True)
class Processes:
    """This process among all that train together."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this one writes the files and speaks."""
        return self.rank == 0

    def largest(self, number: int) -> int:
        """The largest of all processes' numbers; all must ask at the same step."""
        if self.world_size == 1:
            return number
        shared = torch.tensor([number], device=_device())
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return int(shared.item())

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process; all must ask at the same step."""
        return bool(self.largest(int(flag)))

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def average(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replaces each tensor by its mean over all processes: one all-reduce; the tensors share dtype and device."""
        if self.world_size == 1 or not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        flat /= self.world_size
        parts = flat.split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(list(tensors), [part.view_as(t) for part, t in zip(parts, tensors, strict=True)])

    def average_gradients(self, network: nn.Module) -> None:
        """The mean of the network's gradients over all processes, in place."""
        self.average([p.grad for p in network.parameters() if p.grad is not None])

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """[processes, …]: the tensors of all; with one process the tensor itself."""
        if self.world_size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor)
        return torch.stack(parts)

    def take_own(self, target: torch.Tensor, gathered: torch.Tensor) -> bool:
        """Puts this process's part of what `gather` gave into `target`.

        Returns:
            Whether as many processes gathered it; if not, `target` is zero.
        """
        shape = target.shape if self.world_size == 1 else (self.world_size, *target.shape)
        if gathered.shape != shape:
            target.zero_()
            return False
        target.copy_(gathered if self.world_size == 1 else gathered[self.rank])
        return True

    def check_same(self, what: str, number: int) -> None:
        """Makes sure that all processes have the same number.

        Raises:
            ValueError: they differ.
        """
        largest, smallest = self.largest(number), -self.largest(-number)
        if largest != smallest:
            raise ValueError(
                f"process {self.rank}: {what} {number}, but others have {smallest} to {largest}; give all machines "
                "the same --output folder on a file system that they share"
            )


def from_environment() -> Processes:
    """Reads torchrun's variables (`RANK`, `WORLD_SIZE`, `LOCAL_RANK`).

    Raises:
        ValueError: some of them are missing or not numbers.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if "WORLD_SIZE" not in os.environ:
        return Processes()
    try:
        rank, world_size, local_rank = (int(os.environ[name]) for name in names)
    except (KeyError, ValueError) as error:
        raise ValueError(f"WORLD_SIZE is set but {', '.join(names)} are not all numbers: use torchrun") from error
    return Processes(rank, world_size, local_rank)


def join(processes: Processes, device: torch.device) -> None:
    """Meets the other processes: NCCL on GPUs, gloo elsewhere.

    Raises:
        ValueError: some do not come.
    """
    if processes.world_size == 1 or dist.is_initialized():
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        dist.init_process_group(backend)
        return
    store = _own_part(next(dist.rendezvous("env://"))[0], processes)
    dist.init_process_group(backend, store=store, rank=processes.rank, world_size=processes.world_size)


def _own_part(store: dist.Store, processes: Processes, patience: float = 1800.0) -> dist.Store:
    """The part of torchrun's store that belongs to these processes and not to earlier ones of the same ranks.

    torchrun keeps one store over all restarts, in which the addresses of dead processes stand (pytorch issue 135712).
    So the others tell the first one a name that nobody had before, and it tells each of these the name of the part.
    """
    name = uuid.uuid4().hex
    if not processes.is_first:
        store.set(f"fastcifar/{processes.rank}", name)
        part = store.get(f"fastcifar/{name}").decode()
        store.add(f"fastcifar/{part}", 1)
        return dist.PrefixStore(part, store)
    deadline = time.monotonic() + patience
    ranks = [f"fastcifar/{rank}" for rank in range(1, processes.world_size)]
    while store.add(f"fastcifar/{name}", 0) < len(ranks):
        if time.monotonic() > deadline:
            raise ValueError(f"not all of the {processes.world_size} processes came within {patience:.0f} s")
        for key in ranks:
            # A name of a dead process may be there still; its answer goes to nobody.
            if store.check([key]):
                store.set(f"fastcifar/{store.get(key).decode()}", name)
        time.sleep(0.02)
    return dist.PrefixStore(name, store)


def leave() -> None:
    """Ends the meeting, where there was one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def share_weights(model: nn.Module) -> None:
    """Gives every process the first one's parameters and buffers, as DistributedDataParallel does."""
    for tensor in model.state_dict().values():
        dist.broadcast(tensor, 0)


def data_parallel(model: nn.Module) -> nn.parallel.DistributedDataParallel:
    """The model with gradients averaged over the processes; buffers are `share_statistics`' matter."""
    kind = nn.parallel.DistributedDataParallel
    # torch 2.13 renamed the option.
    name = (
        "forward_sync_buffers" if "forward_sync_buffers" in inspect.signature(kind).parameters else "broadcast_buffers"
    )
    return kind(model, gradient_as_bucket_view=True, **{name: False})


def share_statistics(model: nn.Module, *, synchronise: bool) -> list[torch.Tensor]:
    """Lets every batch norm take its statistics over all processes, or (`synchronise=False`) over its own batch only.

    Returns:
        What has to be averaged over the processes after each step: the running statistics, if not synchronised.

    Raises:
        ValueError: a batch norm of torch's own that cannot be synchronised.
    """
    if not synchronise:
        return [b for name, b in model.named_buffers() if name.rpartition(".")[2] in ("running_mean", "running_var")]
    for name, module in model.named_modules():
        if hasattr(module, "process_group"):
            module.process_group = dist.group.WORLD
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"{name} is a {type(module).__name__}, whose statistics cannot be synchronised here; use --no-sync-bn"
            )
    return []


def _device() -> str:
    """Where the present group can exchange small numbers."""
    return "cuda" if dist.get_backend() == "nccl" else "cpu"
