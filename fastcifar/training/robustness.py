"""Adversarial examples within a largest change of each pixel: training on them, and accuracy under attack."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from fastcifar import data
from fastcifar.training import evaluation
from fastcifar.training.options import Recipe

_BATCH = 250
# Standard deviation of the start that TRADES takes, of pixels in [0, 1].
_TRADES_START = 0.001


class Bounds(NamedTuple):
    """What an attack may do to normalised images: the radius and the step of each channel, and what is still a colour;
    each [3, 1, 1]."""

    radius: torch.Tensor
    step: torch.Tensor
    lowest: torch.Tensor
    highest: torch.Tensor


def bounds(
    radius: float, step: float, mean: Sequence[float], std: Sequence[float], device: torch.device | str = "cpu"
) -> Bounds:
    """The bounds for a radius and a step in units of pixels in [0, 1], for images normalised by mean and std."""
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (mean, std))
    return Bounds(radius / std, step / std, -mean / std, (1 - mean) / std)


@contextlib.contextmanager
def _attacked(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients of parameters; everything is put back as it was."""
    modes = [(module, module.training) for module in model.modules()]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter in trained:
            parameter.requires_grad_(True)


def projected_gradient(
    model: nn.Module,
    images: torch.Tensor,
    objective: Callable[[torch.Tensor], torch.Tensor],
    limits: Bounds,
    steps: int,
    start: torch.Tensor,
    amp_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Images near the given ones for which `objective(logits)` is large: ascent by the sign of its gradient, projected.

    The model runs in eval mode, as it is attacked in use: running statistics neither serve one batch nor change. In
    training that gives comparable robustness and a higher clean accuracy than batch statistics (Pang et al., Bag of
    tricks for adversarial training, 2021), and TRADES's own code does it.

    Args:
        model: its modes and parameters are as before afterwards.
        images: [N, 3, H, W], normalised.
        objective: from float32 logits [N, classes] to a scalar.
        limits: of the change.
        steps: gradients taken.
        start: first change, the shape of the images.
        amp_dtype: what the network computes in.

    Returns:
        [N, 3, H, W], float32, no gradient.

    Source: Madry et al., Towards deep learning models resistant to adversarial attacks, 2018.
    """
    images = images.detach().float()
    low = torch.maximum(images - limits.radius, limits.lowest)
    high = torch.minimum(images + limits.radius, limits.highest)
    changed = torch.clamp(images + start, low, high)
    with _attacked(model), torch.enable_grad():
        for _ in range(steps):
            changed.requires_grad_(True)
            with torch.autocast(images.device.type, amp_dtype, enabled=amp_dtype != torch.float32):
                logits = model(changed)
            (gradient,) = torch.autograd.grad(objective(logits.float()), changed)
            changed = torch.clamp(changed.detach() + limits.step * gradient.sign(), low, high)
    return changed


def _divergence(logits: torch.Tensor, wanted: torch.Tensor, reduction: str = "batchmean") -> torch.Tensor:
    """KL divergence of softmax(logits) from softmax(wanted), both [N, classes]; the mean over images, or "sum"."""
    return F.kl_div(logits.log_softmax(1), wanted.log_softmax(1), reduction=reduction, log_target=True)


class AdversarialTraining:
    """What --adversarial adds to a training step.

    "pgd" trains on adversarial images in place of the clean ones (Madry et al., 2018); "trades" on the clean ones, and
    adds β·KL(clean ‖ adversarial) (Zhang et al., Theoretically principled trade-off between robustness and accuracy,
    2019).
    """

    def __init__(self, recipe: Recipe, dataset: data.ImageDataset, device: torch.device, amp_dtype: torch.dtype):
        self.recipe, self.amp_dtype = recipe, amp_dtype
        self._size = dataset.train_images.shape[1:]
        self.limits = bounds(recipe.adversarial_eps, recipe.adversarial_step_size, dataset.mean, dataset.std, device)
        self._radius = self.limits.radius.cpu()
        self._scale = 1 / torch.tensor(dataset.std).view(3, 1, 1)

    def start(self, step: int, count: int, rank: int) -> torch.Tensor:
        """The first change [count, 3, H, W] of this rank's part of the global batch of a 0-based step."""
        generator = torch.Generator().manual_seed((self.recipe.seed * 6_364_136_223_846_793_005 + step) % 2**63)
        shape = ((rank + 1) * count, *self._size)
        if self.recipe.adversarial == "trades":
            change = torch.randn(shape, generator=generator)[rank * count :].permute(0, 3, 1, 2)
            return change * (_TRADES_START * self._scale)
        change = torch.rand(shape, generator=generator)[rank * count :].permute(0, 3, 1, 2)
        return (2 * change - 1) * self._radius

    def images(
        self, model: nn.Module, images: torch.Tensor, labels: torch.Tensor, start: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The images to train on, and those whose outputs are to stay near theirs, if any."""
        trades = self.recipe.adversarial == "trades"
        if trades:
            with _attacked(model), torch.no_grad():
                with torch.autocast(images.device.type, self.amp_dtype, enabled=self.amp_dtype != torch.float32):
                    clean = model(images).float()

        def objective(logits: torch.Tensor) -> torch.Tensor:
            # Only signs of its gradient count; those of a mean over many images would vanish in float16.
            if trades:
                return _divergence(logits, clean, "sum")
            return F.cross_entropy(logits, labels, reduction="sum")

        steps = self.recipe.adversarial_steps
        changed = projected_gradient(model, images, objective, self.limits, steps, start, self.amp_dtype)
        changed = changed.to(images.dtype)
        return (images, changed) if trades else (changed, None)

    def penalty(self, clean: torch.Tensor, changed: torch.Tensor) -> torch.Tensor:
        """What TRADES adds to the loss, from the logits of both images."""
        return self.recipe.trades_beta * _divergence(changed.float(), clean.float())


def robust_evaluation(
    model: nn.Module,
    dataset: data.ImageDataset,
    split: str,
    *,
    device: torch.device,
    radius: float = 8 / 255,
    step: float = 2 / 255,
    steps: int = 20,
    count: int | None = None,
    seed: int = 0,
) -> evaluation.Evaluation:
    """Loss and accuracy on images that projected gradient descent has changed, from one random start, in float32.

    Args:
        model: attacked and evaluated.
        dataset, split: whose "train" or "test" images.
        radius, step, steps: of the attack, in units of pixels in [0, 1]; the default is PGD-20.
        count: the first so many images; None for all.
        seed: of the start.
    """
    limits = bounds(radius, step, dataset.mean, dataset.std, device)
    images, labels = (getattr(dataset, f"{split}_{part}")[:count] for part in ("images", "labels"))
    batches = data.evaluation_batches(
        images, labels, batch_size=_BATCH, mean=dataset.mean, std=dataset.std, device=device
    )
    generator = torch.Generator().manual_seed(seed)

    def changed() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for clean, wanted in batches:
            draw = torch.rand(clean.permute(0, 2, 3, 1).shape, generator=generator).permute(0, 3, 1, 2).to(device)

            def objective(logits: torch.Tensor, wanted=wanted) -> torch.Tensor:
                return F.cross_entropy(logits, wanted, reduction="sum")

            yield projected_gradient(model, clean, objective, limits, steps, (2 * draw - 1) * limits.radius), wanted

    return evaluation.evaluate(model, changed(), device=device, amp_dtype=torch.float32)
