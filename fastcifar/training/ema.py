"""Exponential moving average of a network's weights."""

from __future__ import annotations

import copy

import torch
from torch import nn


class WeightAverage:
    """A copy of `model` whose floating-point tensors follow it slowly; integer buffers are copied.

    After update t (from 0), by `share(t)`, the copy is `d·copy + (1 − d)·model` with
    `d = min(decay, (1 + t) / (10 + t))`, so that the first weights are soon forgotten.

    Args:
        model: the network; its copy is `self.model`, in eval mode.
        decay: between 0 and 1.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        source, target = model.state_dict(), self.model.state_dict()
        floating = [name for name in source if source[name].is_floating_point()]
        self._source = [source[name].detach() for name in floating]
        self._target = [target[name].detach() for name in floating]
        rest = [name for name in source if not source[name].is_floating_point()]
        self._copied = [(target[name], source[name]) for name in rest]

    def share(self, step: int) -> float:
        """1 − d of 0-based `step`."""
        return 1.0 - min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, share: float | torch.Tensor) -> None:
        """Follows the model by this share; a tensor [] of its device where it will be captured in a CUDA graph."""
        if isinstance(share, torch.Tensor):
            steps = torch._foreach_sub(self._source, self._target)
            torch._foreach_mul_(steps, share)
            torch._foreach_add_(self._target, steps)
        else:
            torch._foreach_lerp_(self._target, self._source, share)
        for target, source in self._copied:
            target.copy_(source)
