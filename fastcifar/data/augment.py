"""The augmentations: drawn for each position of a batch from a counter, applied to all images at once.

Every draw is a pure function of (seed, step, position in the global batch); nothing here has a state.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from fastcifar import validation
from fastcifar.data.philox import below, philox, uniform

# The purposes that a position's words serve, one block of four words each.
_GEOMETRY, _COLOUR, _CUTOUT, _MIX, _BOX = range(5)
_GREY = (0.2989, 0.587, 0.114)


@dataclass(frozen=True)
class Augmentation:
    """What is done to a training image, in this order.

    Args:
        crop_pad: shift by up to so many pixels each way, uniformly; 0 for none.
        crop_mode: what comes in at the border: "reflect" (mirrored, the edge pixel not repeated) or "zero" (black).
        hflip: "off", "random" (half of the images of each batch), or "alternating" (an image is mirrored in every
            second epoch, half of them in the odd ones).
        color_jitter: s; brightness, contrast and saturation are scaled by factors from [1 − s, 1 + s], in this order,
            each clamped to [0, 1], as torchvision's ColorJitter does.
        cutout: side of a square that is set to the mean colour, its centre anywhere, clipped at the border.
        mixup, cutmix: α of the Beta(α, α) that the share of each image's partner is drawn from; 0 for none.

    Raises:
        ValueError: an unknown mode, or a value out of range.

    Source: Jordan, 94 % on CIFAR-10 in 3.29 seconds, 2024 (alternating flip); DeVries and Taylor, Cutout, 2017;
    Zhang et al., mixup, 2018; Yun et al., CutMix, 2019.
    """

    crop_pad: int = 0
    crop_mode: str = "reflect"
    hflip: str = "off"
    color_jitter: float = 0.0
    cutout: int = 0
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        validation.choose("crop_mode", self.crop_mode, ("reflect", "zero"))
        validation.choose("hflip", self.hflip, ("off", "random", "alternating"))
        for name in ("crop_pad", "cutout"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"Augmentation: {name} must be a whole number of pixels ≥ 0, got {value!r}")
        if not 0.0 <= self.color_jitter <= 1.0:
            raise ValueError(f"Augmentation: color_jitter must lie in [0, 1], got {self.color_jitter!r}")
        for name in ("mixup", "cutmix"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"Augmentation: {name} must be ≥ 0 and finite, got {getattr(self, name)!r}")
        if self.mixup and self.cutmix:
            raise ValueError("Augmentation: mixup and cutmix exclude each other; set one of them to 0")

    @property
    def mixes(self) -> bool:
        """Whether images get a partner."""
        return bool(self.mixup or self.cutmix)


def source_axis(size: int, shift: torch.Tensor, pad: int, mode: str) -> torch.Tensor:
    """Which row (or column) of the image each output row shows, [n, size]; `size` where that is outside (black)."""
    axis = torch.arange(size, device=shift.device) + (shift - pad)[:, None]
    if mode == "zero":
        return torch.where((axis < 0) | (axis >= size), size, axis)
    axis = axis.abs()
    return torch.where(axis >= size, 2 * (size - 1) - axis, axis)


def geometry(
    options: Augmentation,
    positions: torch.Tensor,
    step: int,
    seed: int,
    flips: torch.Tensor | None,
    size: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Source row [n, H] and source column [n, W] of every output pixel.

    Args:
        positions: [n], int64, in the global batch.
        flips: [n], bool, for alternating flips.
        size: (H, W).
    """
    return place(options, *drawn_view(options, positions, step, seed, flips), size)


def drawn_view(
    options: Augmentation, positions: torch.Tensor, step: int, seed: int, flips: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Shift of rows and of columns, in [0, 2·crop_pad], and flip (None: none at all) of every position, [n] each."""
    words = philox(positions, step, _GEOMETRY, seed)
    span = 2 * options.crop_pad + 1
    if options.hflip == "random":
        flips = words[2] >> 31 == 1
    return below(words[0], span), below(words[1], span), flips


def place(
    options: Augmentation,
    shift_rows: torch.Tensor,
    shift_columns: torch.Tensor,
    flips: torch.Tensor | None,
    size: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Source row [n, H] and source column [n, W] of every output pixel of images shifted and flipped so."""
    rows = source_axis(size[0], shift_rows, options.crop_pad, options.crop_mode)
    columns = source_axis(size[1], shift_columns, options.crop_pad, options.crop_mode)
    if flips is not None:
        columns = torch.where(flips[:, None], columns.flip(1), columns)
    return rows, columns


def jitter(images: torch.Tensor, strength: float, positions: torch.Tensor, step: int, seed: int) -> torch.Tensor:
    """Brightness, contrast, saturation; images float32 [n, H, W, 3] in [0, 1]."""
    factors = (1 + strength * (2 * uniform(philox(positions, step, _COLOUR, seed)) - 1)).float()
    brightness, contrast, saturation = (f[:, None, None, None] for f in factors[:3])
    grey = torch.tensor(_GREY, device=images.device)
    images = (images * brightness).clamp_(0, 1)
    mean = (images @ grey).mean((1, 2))[:, None, None, None]
    images = torch.lerp(mean, images, contrast).clamp_(0, 1)
    return torch.lerp((images @ grey)[..., None], images, saturation).clamp_(0, 1)


def _boxes(centre_y, centre_x, box_height, box_width, size) -> torch.Tensor:
    """Masks [n, H, W] of boxes of these sizes about these centres, clipped at the border."""
    height, width = size
    top, left = (centre_y - box_height // 2)[:, None], (centre_x - box_width // 2)[:, None]
    y, x = torch.arange(height, device=top.device), torch.arange(width, device=top.device)
    inside_y = (y >= top) & (y < top + box_height[:, None])
    inside_x = (x >= left) & (x < left + box_width[:, None])
    return inside_y[:, :, None] & inside_x[:, None, :]


def cutout_mask(side: int, positions: torch.Tensor, step: int, seed: int, size: tuple[int, int]) -> torch.Tensor:
    """Which pixels are cut out, [n, H, W]."""
    words = philox(positions, step, _CUTOUT, seed)
    sides = torch.full_like(positions, side)
    return _boxes(below(words[0], size[0]), below(words[1], size[1]), sides, sides, size)


@functools.cache
def _beta_table(alpha: float, points: int = 4097) -> torch.Tensor:
    """Quantiles of Beta(α, α) restricted to [0, 1/2], at equal steps of probability.

    With t = u^(1/α) the density becomes (1 − t)^(α−1) du on [0, 2^(−α)], which is smooth, so a trapezoid sum serves.
    """
    u = torch.linspace(0, 2.0**-alpha, 32 * (points - 1) + 1, dtype=torch.float64)
    value = u ** (1 / alpha)
    density = (1 - value) ** (alpha - 1)
    mass = torch.cat([torch.zeros(1, dtype=torch.float64), torch.cumsum(density[1:] + density[:-1], 0)])
    wanted = torch.linspace(0, 1, points, dtype=torch.float64) * mass[-1]
    right = torch.searchsorted(mass, wanted).clamp(1, len(mass) - 1)
    share = (wanted - mass[right - 1]) / (mass[right] - mass[right - 1])
    return torch.lerp(u[right - 1], u[right], share.clamp(0, 1)) ** (1 / alpha)


def beta(alpha: float, word: torch.Tensor, side: torch.Tensor) -> torch.Tensor:
    """Beta(α, α) variates [n], float64, from two words: the quantile on the left half, and which half."""
    table = _beta_table(float(alpha)).to(word.device)
    place = uniform(word) * (len(table) - 1)
    index = place.long()
    value = torch.lerp(table[index], table[index + 1], place - index)
    return torch.where(side >> 31 == 1, 1 - value, value)


def partner_shift(step: int, seed: int, batch_size: int) -> int:
    """How far along the global batch each image's partner stands; the same for all images of a step."""
    if batch_size < 2:
        return 0
    word = philox(torch.zeros(1, dtype=torch.int64), step, _MIX, seed)[0]
    return 1 + int(below(word, batch_size - 1))


def mix(
    options: Augmentation, images: torch.Tensor, partners: torch.Tensor, positions: torch.Tensor, step: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixes [n, H, W, 3] images with their partners; also the partner's share of each, [n], float32."""
    words = philox(positions, step, _BOX, seed)
    share = beta(options.mixup or options.cutmix, words[0], words[1])
    if options.mixup:
        share = share.float()
        return torch.lerp(images, partners, share[:, None, None, None]), share
    height, width = images.shape[1:3]
    side = share.sqrt()
    box = ((side * height).long(), (side * width).long())
    mask = _boxes(below(words[2], height), below(words[3], width), *box, (height, width))
    return torch.where(mask[..., None], partners, images), mask.float().mean((1, 2))
