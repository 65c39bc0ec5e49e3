"""The augmentations in plain PyTorch: the definition that every kernel is held to.

Every draw is a pure function of (seed, step, position in the global batch); nothing here has a state.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy
import torch

from fastcifar.philox import below, philox, uniform

# The purposes that a position's words serve, one block of four words each.
_GEOMETRY, _COLOUR, _CUTOUT, _MIX, _BOX = range(5)
_GREY = (0.2989, 0.587, 0.114)
_BETA_POINTS = 4097


def normalisation(mean: Sequence[float], std: Sequence[float]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Scale and shift of each channel that take bytes to normalised values, rounded to float32."""
    return _normalisation(tuple(mean), tuple(std))


@functools.lru_cache(maxsize=64)
def _normalisation(mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    scale, shift = ([1 / (255 * s) for s in std], [-m / s for m, s in zip(mean, std, strict=True)])
    return tuple(numpy.float32(scale).tolist()), tuple(numpy.float32(shift).tolist())


@functools.cache
def _constants(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Kept, because a captured graph may copy nothing from the host."""
    return torch.tensor(numbers, dtype=dtype, device=device)


def augment(
    images: torch.Tensor,
    indices: torch.Tensor,
    *,
    step: int | torch.Tensor,
    seed: int,
    mean: Sequence[float],
    std: Sequence[float],
    first: int = 0,
    count: int | None = None,
    flips: torch.Tensor | None = None,
    random_flip: bool = False,
    crop_pad: int = 0,
    crop_mode: str = "reflect",
    color_jitter: float = 0.0,
    cutout: int = 0,
    mixup: float = 0.0,
    cutmix: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Augmented, normalised images; arguments and results as in `fastcifar.functional.augment`.

    In float64 the draws and the normalisation's factors are still those of float32.
    """
    batch_size, (height, width) = len(indices), images.shape[1:3]
    positions = torch.arange(first, batch_size if count is None else first + count, device=images.device)
    compute = torch.promote_types(dtype, torch.float32)
    scale, shift = (_constants(numbers, compute, images.device) for numbers in normalisation(mean, std))

    def render(where: torch.Tensor) -> torch.Tensor:
        """[n, H, W, 3] of the images at these positions, before mixing."""
        mirrored = None if flips is None else flips[where]
        views = draw_views(where, step, seed, crop_pad, random_flip, mirrored)
        made = show_views(images, indices[where], views, crop_pad, crop_mode).to(compute)
        if color_jitter:
            made = _jitter(made / 255, color_jitter, where, step, seed) * 255
        made = torch.addcmul(shift, made, scale)
        if cutout:
            made.masked_fill_(_cutout_mask(cutout, where, step, seed, (height, width))[..., None], 0.0)
        return made

    made, partners, weight = render(positions), None, None
    if mixup or cutmix:
        others = (positions + partner_shift(indices, step, seed)) % batch_size
        partners = indices[others]
        words = philox(positions, step, _BOX, seed)
        if mixup:
            made, weight = _blend(mixup, words, made, render(others))
        else:
            made, weight = _paste(cutmix, words, made, render(others))
    return made.to(dtype).permute(0, 3, 1, 2), partners, weight


def _source_axis(size: int, shift: torch.Tensor, pad: int, mode: str) -> torch.Tensor:
    """Which row (or column) of the image each output row shows, [n, size]; `size` where that is outside (black)."""
    axis = torch.arange(size, device=shift.device) + (shift - pad)[:, None]
    if mode == "zero":
        return torch.where((axis < 0) | (axis >= size), size, axis)
    axis = axis.abs()
    return torch.where(axis >= size, 2 * (size - 1) - axis, axis)


def draw_views(
    positions: torch.Tensor,
    step: int | torch.Tensor,
    seed: int,
    pad: int,
    random_flip: bool,
    flips: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Shifts of rows and columns, in [0, 2·pad], and flips (None for none at all) of these positions, [n] each."""
    words = philox(positions, step, _GEOMETRY, seed)
    if random_flip:
        flips = words[2] >> 31 == 1
    return below(words[0], 2 * pad + 1), below(words[1], 2 * pad + 1), flips


def show_views(
    images: torch.Tensor,
    index: torch.Tensor,
    views: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    pad: int,
    mode: str,
) -> torch.Tensor:
    """Bytes [n, H, W, 3] of images [N, H, W, 3] by index, shifted and flipped as `draw_views` says."""
    shift_rows, shift_columns, flips = views
    rows = _source_axis(images.shape[1], shift_rows, pad, mode)
    columns = _source_axis(images.shape[2], shift_columns, pad, mode)
    if flips is not None:
        columns = torch.where(flips[:, None], columns.flip(1), columns)
    return _gather(images, index, rows, columns, mode == "zero" and pad > 0)


def _gather(
    images: torch.Tensor, index: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, black: bool
) -> torch.Tensor:
    """Bytes [n, H, W, 3] of these rows and columns of images [N, H, W, 3]; with `black` some may be at the image's
    size, which stands for outside."""
    height, width = images.shape[1:3]
    pixels = (index[:, None] * height + rows)[:, :, None] * width + columns[:, None, :]
    if black:
        outside = (rows == height)[:, :, None] | (columns == width)[:, None, :]
        pixels.masked_fill_(outside, 0)
    # Whole pixels by index_select: several times faster than indexing.
    chosen = images.view(-1, 3).index_select(0, pixels.view(-1)).view(*pixels.shape, 3)
    return chosen.masked_fill_(outside[..., None], 0) if black else chosen


def _jitter(images: torch.Tensor, strength: float, positions: torch.Tensor, step, seed: int) -> torch.Tensor:
    """Brightness, contrast, saturation; images [n, H, W, 3] in [0, 1]."""
    factors = (1 + strength * (2 * uniform(philox(positions, step, _COLOUR, seed)) - 1)).float().to(images.dtype)
    brightness, contrast, saturation = (f[:, None, None, None] for f in factors[:3])
    grey = _constants(_GREY, images.dtype, images.device)
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


def _cutout_mask(side: int, positions: torch.Tensor, step, seed: int, size: tuple[int, int]) -> torch.Tensor:
    """Which pixels are cut out, [n, H, W]."""
    words = philox(positions, step, _CUTOUT, seed)
    sides = torch.full_like(positions, side)
    return _boxes(below(words[0], size[0]), below(words[1], size[1]), sides, sides, size)


@functools.cache
def beta_table(alpha: float, device: torch.device | None = None) -> torch.Tensor:
    """Quantiles of Beta(α, α) restricted to [0, 1/2], at equal steps of probability, float64 [4097].

    With t = u^(1/α) the density becomes (1 − t)^(α−1) du on [0, 2^(−α)], which is smooth, so a trapezoid sum serves.
    """
    u = torch.linspace(0, 2.0**-alpha, 32 * (_BETA_POINTS - 1) + 1, dtype=torch.float64)
    value = u ** (1 / alpha)
    density = (1 - value) ** (alpha - 1)
    mass = torch.cat([torch.zeros(1, dtype=torch.float64), torch.cumsum(density[1:] + density[:-1], 0)])
    wanted = torch.linspace(0, 1, _BETA_POINTS, dtype=torch.float64) * mass[-1]
    right = torch.searchsorted(mass, wanted).clamp(1, len(mass) - 1)
    share = (wanted - mass[right - 1]) / (mass[right] - mass[right - 1])
    return (torch.lerp(u[right - 1], u[right], share.clamp(0, 1)) ** (1 / alpha)).to(device)


def beta(alpha: float, word: torch.Tensor, side: torch.Tensor) -> torch.Tensor:
    """Beta(α, α) variates [n], float64, from two words: the quantile on the left half, and which half."""
    table = beta_table(float(alpha), word.device)
    place = uniform(word) * (len(table) - 1)
    index = place.long()
    value = table[index] + (place - index) * (table[index + 1] - table[index])
    return torch.where(side >> 31 == 1, 1 - value, value)


def partner_shift(indices: torch.Tensor, step, seed: int) -> torch.Tensor | int:
    """How far along the global batch each image's partner stands; the same for all images of a step."""
    if len(indices) < 2:
        return 0
    return 1 + below(philox(indices.new_zeros(1), step, _MIX, seed)[0], len(indices) - 1)


def _blend(alpha: float, words: torch.Tensor, images: torch.Tensor, partners: torch.Tensor):
    """Mixup of [n, H, W, 3]; also the partner's share of each, [n], float32."""
    share = beta(alpha, words[0], words[1]).float()
    return torch.lerp(images, partners, share[:, None, None, None].to(images.dtype)), share


def _paste(alpha: float, words: torch.Tensor, images: torch.Tensor, partners: torch.Tensor):
    """CutMix of [n, H, W, 3]; also the partner's share of each, [n], float32."""
    height, width = images.shape[1:3]
    side = beta(alpha, words[0], words[1]).sqrt()
    box = ((side * height).long(), (side * width).long())
    mask = _boxes(below(words[2], height), below(words[3], width), *box, (height, width))
    return torch.where(mask[..., None], partners, images), mask.float().mean((1, 2))
