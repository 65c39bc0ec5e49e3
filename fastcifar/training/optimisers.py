"""Optimisers with the decay where it belongs, and a step that spares the weights when a gradient is not finite."""

from __future__ import annotations

import torch
from torch import nn

from fastcifar.profiling import annotate
from fastcifar.training.options import Recipe


def build_optimiser(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """The recipe's optimiser; weight decay acts on parameters of two or more dimensions, not on norms and biases."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if recipe.opt == "sgd":
        nesterov = recipe.momentum > 0
        optimiser = torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=nesterov, fused=True)
        begin_momentum(optimiser)
        return optimiser
    kind = torch.optim.Adam if recipe.opt == "adam" else torch.optim.AdamW
    # Only a capturable one may be captured in a CUDA graph; its state lies on the device all the same.
    capturable = trained[0].device.type == "cuda"
    return kind(groups, lr=recipe.lr, betas=(recipe.momentum, recipe.beta2), fused=True, capturable=capturable)


def begin_momentum(optimiser: torch.optim.Optimizer) -> None:
    """Gives SGD's parameters that have not been trained yet their first momentum, zero.

    torch's fused SGD takes no group in which some have one and others do not, and leaves uninitialised memory as
    momentum where the first step is skipped.
    """
    for group in optimiser.param_groups:
        if isinstance(optimiser, torch.optim.SGD) and group["momentum"]:
            for parameter in group["params"]:
                optimiser.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))


class GuardedStep:
    """Backward, unscaling, clipping and the optimiser's step, with no synchronisation between host and device.

    Weights and buffers stay as they are when a gradient is not finite; `bad_steps` counts such steps and `first_bad` is
    the first of them (−1: none), both int64 tensors on the device.

    Args:
        optimiser: a fused one.
        network: whose parameters it updates; its buffers, such as running statistics, have seen the bad batch.
        clip_grad: largest gradient norm, 0 for no limit.
        fp16: scale the loss, as gradients below 6e-8 vanish in float16.
    """

    def __init__(
        self,
        optimiser: torch.optim.Optimizer,
        network: nn.Module,
        clip_grad: float,
        device: torch.device,
        fp16: bool,
    ):
        self.optimiser = optimiser
        self.clip_grad = clip_grad
        self.scaler = torch.amp.GradScaler(device.type) if fp16 else None
        self.bad_steps = torch.zeros((), dtype=torch.int64, device=device)
        self.first_bad = torch.full((), -1, dtype=torch.int64, device=device)
        self._parameters = [p for group in optimiser.param_groups for p in group["params"]]
        self._buffers = [b for b in network.buffers() if b.is_floating_point() and b.numel()]
        self.keep_buffers()

    def __call__(self, loss: torch.Tensor, step: int | torch.Tensor, learning_rate: float | torch.Tensor) -> None:
        """One update for a scalar loss; tensors [] for step and rate where it will be captured in a CUDA graph."""
        self.optimiser.zero_grad(set_to_none=True)
        with annotate("backward"):
            if self.scaler is None:
                loss.backward()
            else:
                self.scaler.scale(loss).backward()
                self.scaler.unscale_(self.optimiser)
        with annotate("update"):
            self.apply(loss, step, learning_rate)

    def apply(self, loss: torch.Tensor, step: int | torch.Tensor, learning_rate: float | torch.Tensor) -> None:
        """The update by the gradients that are there, those of `loss`."""
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        finite = torch.isfinite(norm)
        if self.clip_grad:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self.clip_grad, norm, foreach=True)
        if self.scaler is None:
            self._record(~finite, step)
            self.optimiser.grad_scale = None
            self.optimiser.found_inf = (~finite).to(torch.float32)
            self.optimiser.step()
        else:
            # The scaler skips overflows by itself and then lowers its scale; only a bad loss is an error here.
            self._record(~torch.isfinite(loss.detach()), step)
            self.scaler.step(self.optimiser)
            self.scaler.update()

    def keep_buffers(self) -> None:
        """Takes the network's present buffers for good ones; after loading others."""
        self._kept = self._flat_buffers()

    def _flat_buffers(self) -> torch.Tensor | None:
        return torch.cat([b.detach().flatten() for b in self._buffers]) if self._buffers else None

    @torch.no_grad()
    def _restore_buffers(self, bad: torch.Tensor) -> None:
        """After a bad step those of the step before; a few launches, however many buffers."""
        if not self._buffers:
            return
        kept = torch.where(bad, self._kept, self._flat_buffers())
        self._kept.copy_(kept)
        parts = kept.split([b.numel() for b in self._buffers])
        torch._foreach_copy_(self._buffers, [part.view_as(b) for part, b in zip(parts, self._buffers, strict=True)])

    def _record(self, bad: torch.Tensor, step: int | torch.Tensor) -> None:
        self.bad_steps += bad
        self.first_bad.copy_(torch.where(bad & (self.first_bad < 0), step, self.first_bad))
        self._restore_buffers(bad)
