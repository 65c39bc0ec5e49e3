"""The processes of a run, as `torchrun` starts them; one process needs nothing of this."""

from __future__ import annotations

import os
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

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process; all must ask at the same step."""
        if self.world_size == 1:
            return flag
        shared = torch.tensor([float(flag)])
        if dist.get_backend() == "nccl":
            shared = shared.cuda()
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return bool(shared.item())

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def average_gradients(self, network: nn.Module) -> None:
        """The mean of the network's gradients over all processes, in place and in one message."""
        if self.world_size == 1:
            return
        gradients = [p.grad for p in network.parameters() if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= self.world_size
        parts = flat.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [p.view_as(g) for p, g in zip(parts, gradients, strict=True)])


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
    """Meets the other processes: NCCL on GPUs, gloo elsewhere."""
    if processes.world_size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def leave() -> None:
    """Ends the meeting, where there was one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def synchronise_statistics(model: nn.Module) -> None:
    """Lets every batch norm take its statistics over all processes.

    Raises:
        ValueError: a batch norm of torch's own that cannot.
    """
    for name, module in model.named_modules():
        if hasattr(module, "process_group"):
            module.process_group = dist.group.WORLD
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ValueError(f"{name} is a {type(module).__name__}, whose statistics cannot be synchronised here")
