"""Differentiable augmentation of real and generated images alike, drawn from given random numbers.

Source: Zhao et al., Differentiable augmentation for data-efficient GAN training, 2020.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

# Random numbers in [0, 1) that an image needs.
NUMBERS = 7


def diff_augment(images: torch.Tensor, policies: Sequence[str], numbers: torch.Tensor) -> torch.Tensor:
    """Augments images.

    Args:
        images: [N, C, H, W] in [−1, 1].
        policies: of "color" (brightness ±0.5, saturation ×[0, 2], contrast ×[0.5, 1.5]), "translation" (by up to 1/8
            of the side, zeros come in) and "cutout" (a square of half the side becomes zero), in this order.
        numbers: [N, 7], uniform in [0, 1).

    Returns:
        [N, C, H, W].
    """
    columns = numbers.to(images.dtype).unbind(1)
    if "color" in policies:
        brightness, saturation, contrast = (column[:, None, None, None] for column in columns[:3])
        images = images + (brightness - 0.5)
        images = torch.lerp(images.mean(1, keepdim=True), images, 2 * saturation)
        images = torch.lerp(images.mean((1, 2, 3), keepdim=True), images, contrast + 0.5)
    if "translation" in policies:
        rows, shifts = (
            _shift(images, size, column) for size, column in zip(images.shape[2:], columns[3:5], strict=True)
        )
        images = rows[:, None] @ images @ shifts[:, None].transpose(2, 3)
    if "cutout" in policies:
        rows, kept = (_inside(images, size, column) for size, column in zip(images.shape[2:], columns[5:], strict=True))
        images = images * (1 - rows[:, None, :, None] * kept[:, None, None, :])
    return images


def _shift(images: torch.Tensor, size: int, numbers: torch.Tensor) -> torch.Tensor:
    """[N, size, size]: matrices that move rows by up to size/8. A product is its own derivative, and deterministic."""
    most = int(size / 8 + 0.5)
    moved = (numbers.float() * (2 * most + 1)).floor().long() - most
    place = torch.arange(size, device=images.device)
    return (place[None, :, None] + moved[:, None, None] == place[None, None, :]).to(images.dtype)


def _inside(images: torch.Tensor, size: int, numbers: torch.Tensor) -> torch.Tensor:
    """[N, size]: 1 within a span of size/2 whose middle lies anywhere, 0 elsewhere."""
    length = int(size / 2 + 0.5)
    middle = (numbers.float() * (size + (1 - length % 2))).floor()[:, None]
    place = torch.arange(size, device=images.device)[None]
    first = middle - length // 2
    return ((place >= first) & (place < first + length)).to(images.dtype)
