"""What the ranks exchange in a step of the adaptive-weighted hinge: counts, losses and scores, and two gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist


class Exchange:
    """Sums over all ranks, each under way while the next backward pass runs.

    Losses and gradients are divided by this rank's counts times the number of ranks, as if all had as many. The true
    counts travel with the losses during the first backward pass and put both right (equal counts: by a factor of 1).

    Args:
        parameters: the trained ones; both gradients of each lie in flat buffers, float32, or float64 for float64.
        process_group: the ranks.
    """

    def __init__(self, parameters: Sequence[torch.Tensor], process_group: dist.ProcessGroup):
        self.group = process_group
        self._key = _signature(parameters)
        self._flats: list[torch.Tensor] = []
        self._views: tuple[list, list] = ([None] * len(parameters), [None] * len(parameters))
        self._counts: dict[tuple, torch.Tensor] = {}
        for dtype in (torch.float32, torch.float64):
            members = [i for i, p in enumerate(parameters) if (p.dtype == torch.float64) == (dtype == torch.float64)]
            sizes = [parameters[i].numel() for i in members]
            if not members:
                continue
            flat = torch.empty(2, sum(sizes), dtype=dtype, device=parameters[0].device)
            self._flats.append(flat)
            for side in range(2):
                for i, part in zip(members, flat[side].split(sizes), strict=True):
                    self._views[side][i] = _shaped(part, parameters[i])

    def fits(self, parameters: Sequence[torch.Tensor], process_group: dist.ProcessGroup) -> bool:
        """Whether it was made for these."""
        return self.group is process_group and self._key == _signature(parameters)

    def provisional_counts(self, real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
        """This rank's numbers of logits times the number of ranks, float64 [2]."""
        key = (real_logits.numel(), fake_logits.numel())
        if key not in self._counts:
            # Uploaded once, outside any capture of a CUDA graph.
            self._counts[key] = torch.tensor(key, dtype=torch.float64, device=real_logits.device)
        self._own = self._counts[key]
        self._provisional = self._own * dist.get_world_size(self.group)
        return self._provisional

    def start_terms(self, terms: torch.Tensor) -> None:
        """Sends losses and scores, float64 [4], before the first backward pass."""
        self._sums = torch.cat([terms * self._provisional.repeat(2), self._own])
        self._works: list[dist.Work] = []
        self._terms_work = dist.all_reduce(self._sums, group=self.group, async_op=True)

    @torch.no_grad()
    def start_gradients(self, side: int, gradients: Sequence[torch.Tensor | None]) -> None:
        """Sends the gradients of the real (0) or generated (1) side after their backward pass."""
        if side == 0:
            self._terms_work.wait()
            self._factors = self._provisional / self._sums[4:]
        views = self._views[side]
        missing = [view for view, gradient in zip(views, gradients, strict=True) if gradient is None]
        if missing:
            torch._foreach_zero_(missing)
        given = [(view, g) for view, g in zip(views, gradients, strict=True) if g is not None]
        if given:
            torch._foreach_copy_(*map(list, zip(*given, strict=True)))
        for flat in self._flats:
            flat[side] *= self._factors[side].to(flat.dtype)
            self._works.append(dist.all_reduce(flat[side], group=self.group, async_op=True))

    def finish(self) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
        """Losses and scores [4] of the whole batch, and both gradients of every parameter."""
        for work in self._works:
            work.wait()
        return self._sums[:4] / self._sums[4:].repeat(2), *self._views


def _signature(parameters: list[torch.Tensor]) -> list[tuple]:
    return [(id(parameter), parameter.device, parameter.dtype) for parameter in parameters]


def _shaped(part: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A flat piece as a tensor of the parameter's shape, in its memory order where that is channels-last."""
    if parameter.dim() == 4 and not parameter.is_contiguous():
        if parameter.is_contiguous(memory_format=torch.channels_last):
            return part.as_strided(parameter.shape, parameter.stride())
    return part.view(parameter.shape)
