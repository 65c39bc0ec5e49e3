"""The resident loader: the whole set on the device as bytes, every batch a pure function of (seed, step, position)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy
import torch

from fastcifar.data import augment
from fastcifar.data.augment import Augmentation

__all__ = ["Augmentation", "Batch", "ResidentLoader", "evaluation_batches"]

_EPOCH_ORDER, _FLIP_HALF = 0, 1


class Batch(NamedTuple):
    """One rank's part of a global batch.

    `images` is [n, 3, H, W], channels-last and normalised; `labels` int64 [n]. With mixup or cutmix `partner_labels`
    int64 [n] and `partner_weight` float32 [n] (the partner's share of the target), else None.
    """

    images: torch.Tensor
    labels: torch.Tensor
    partner_labels: torch.Tensor | None
    partner_weight: torch.Tensor | None


def _generator(seed: int, purpose: int, index: int) -> numpy.random.Generator:
    return numpy.random.Generator(numpy.random.Philox(key=[seed, (purpose << 40) | index]))


def _pack(images: numpy.ndarray) -> torch.Tensor:
    """[N, H, W, 3] bytes as [N·H·W + 1] int32, one pixel each and a black one at the end: a pixel is one load."""
    packed = numpy.zeros((images.size // 3 + 1, 4), numpy.uint8)
    packed[:-1, :3] = images.reshape(-1, 3)
    return torch.from_numpy(packed.view(numpy.int32).reshape(-1))


class ResidentLoader:
    """Augmented training batches out of a set that stays on the device.

    The order of an epoch is a permutation keyed by (seed, epoch); the batches cut the endless sequence of epochs, so
    that an epoch's remainder begins the next one's first batch and each index occurs exactly once an epoch.

    Args:
        images: uint8 [N, H, W, 3].
        labels: int64 [N].
        batch_size: of the global batch, over all ranks; a multiple of `world_size`.
        num_classes: number of classes; labels must lie below it.
        seed: of order and augmentation, in [0, 2⁶³).
        augmentation: what is done to each image.
        mean, std: of each channel, of values in [0, 1].
        device: where the set lies and the batches are made.
        dtype: of the batches; float32, bfloat16 or float16.
        rank, world_size: this process's contiguous part of each global batch.

    Raises:
        ValueError: shapes, sizes or ranks that do not fit.
    """

    def __init__(
        self,
        images: numpy.ndarray,
        labels: numpy.ndarray,
        *,
        batch_size: int,
        num_classes: int,
        seed: int = 0,
        augmentation: Augmentation = Augmentation(),  # noqa: B008  (frozen)
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        rank: int = 0,
        world_size: int = 1,
    ):
        if images.ndim != 4 or images.shape[3] != 3 or images.dtype != numpy.uint8 or len(images) != len(labels):
            raise ValueError(
                f"ResidentLoader: images must be uint8 (N, H, W, 3) with N labels, got {images.dtype} {images.shape} "
                f"and {len(labels)} labels"
            )
        if len(images) == 0 or not 0 <= labels.min() <= labels.max() < num_classes:
            raise ValueError(f"ResidentLoader: needs images, with labels in [0, {num_classes - 1}]")
        if batch_size < 1 or batch_size % world_size or not 0 <= rank < world_size:
            raise ValueError(
                f"ResidentLoader: batch_size {batch_size} must be a multiple of world_size {world_size}, rank {rank} "
                "below it"
            )
        size = images.shape[1:3]
        if augmentation.crop_pad >= min(size) and augmentation.crop_mode == "reflect":
            raise ValueError(f"ResidentLoader: crop_pad {augmentation.crop_pad} must be below the image size {size}")
        self.batch_size, self.seed, self.augmentation = batch_size, seed, augmentation
        self.device, self.dtype = torch.device(device), dtype
        self._count, self._size = len(images), (size[0], size[1])
        self._pixels = _pack(images).to(self.device)
        self._labels = torch.from_numpy(labels).to(self.device)
        self._scale, self._shift = _normalisation(mean, std, self.device)
        share = batch_size // world_size
        self._positions = numpy.arange(rank * share, (rank + 1) * share)
        halves = _generator(seed, _FLIP_HALF, 0).integers(0, 2, self._count, dtype=numpy.int64)
        self._flip_half = halves if augmentation.hflip == "alternating" else None
        self._orders: dict[int, numpy.ndarray] = {}

    @property
    def steps_per_epoch(self) -> float:
        """Batches in an epoch, not rounded."""
        return self._count / self.batch_size

    def epoch_of(self, step: int) -> int:
        """The epoch that the first image of a 0-based step belongs to."""
        return step * self.batch_size // self._count

    def _order(self, epoch: int) -> numpy.ndarray:
        if epoch not in self._orders:
            if len(self._orders) > 3:
                self._orders.clear()
            self._orders[epoch] = _generator(self.seed, _EPOCH_ORDER, epoch).permutation(self._count)
        return self._orders[epoch]

    def _indices(self, step: int, positions: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Image index and epoch of each position of the global batch."""
        epochs, places = numpy.divmod(step * self.batch_size + positions, self._count)
        indices = numpy.empty_like(places)
        for epoch in numpy.unique(epochs):
            chosen = epochs == epoch
            indices[chosen] = self._order(int(epoch))[places[chosen]]
        return indices, epochs

    def _chosen(self, step: int, positions: numpy.ndarray) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Image index and alternating flip of each position."""
        indices, epochs = self._indices(step, positions)
        flips = None
        if self._flip_half is not None:
            flips = torch.from_numpy((self._flip_half[indices] + epochs) % 2 == 1).to(self.device)
        return torch.from_numpy(indices).to(self.device), flips

    def _augmented(self, step: int, positions: numpy.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised float32 [n, H, W, 3] images and labels at these positions, before mixing."""
        options, seed = self.augmentation, self.seed
        index, flips = self._chosen(step, positions)
        where = torch.from_numpy(positions).to(self.device)
        images = self._gather(index, *augment.geometry(options, where, step, seed, flips, self._size))
        if options.color_jitter:
            images = augment.jitter(images.float() / 255, options.color_jitter, where, step, seed) * 255
        images = torch.addcmul(self._shift, images.float(), self._scale)
        if options.cutout:
            mask = augment.cutout_mask(options.cutout, where, step, seed, self._size)
            images.masked_fill_(mask[..., None], 0.0)
        return images, self._labels[index]

    def _gather(self, index: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Bytes [n, H, W, 3] of the wanted rows and columns; an index of the image's size means black."""
        height, width = self._size
        pixel = (index[:, None] * height + rows)[:, :, None] * width + columns[:, None, :]
        if self.augmentation.crop_mode == "zero" and self.augmentation.crop_pad:
            outside = (rows == height)[:, :, None] | (columns == width)[:, None, :]
            pixel = pixel.masked_fill_(outside, len(self._pixels) - 1)
        return self._pixels[pixel].view(torch.uint8).view(len(index), height, width, 4)[..., :3]

    @property
    def views(self) -> int:
        """How many ways there are to crop and flip an image."""
        return (2 * self.augmentation.crop_pad + 1) ** 2 * (1 if self.augmentation.hflip == "off" else 2)

    def views_of(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Image index and number of its view, int64 [n] each, of this rank's part of the batch of 0-based `step`."""
        index, flips = self._chosen(step, self._positions)
        where = torch.from_numpy(self._positions).to(self.device)
        rows, columns, flips = augment.drawn_view(self.augmentation, where, step, self.seed, flips)
        span = 2 * self.augmentation.crop_pad + 1
        number = rows * span + columns
        return index, number if flips is None else number + flips * span**2

    def view_images(self, index: torch.Tensor, view: torch.Tensor) -> torch.Tensor:
        """Views by number, [n, 3, H, W], of the images with these indices: cropped, flipped, normalised."""
        span = 2 * self.augmentation.crop_pad + 1
        index, view = index.to(self.device), view.to(self.device)
        shifts = view // span % span, view % span, view >= span**2
        images = self._gather(index, *augment.place(self.augmentation, *shifts, self._size))
        return torch.addcmul(self._shift, images.float(), self._scale).to(self.dtype).permute(0, 3, 1, 2)

    def batch(self, step: int) -> Batch:
        """This rank's part of the global batch of 0-based `step`; the same at every call."""
        images, labels = self._augmented(step, self._positions)
        partner_labels = partner_weight = None
        if self.augmentation.mixes:
            ahead = augment.partner_shift(step, self.seed, self.batch_size)
            partners, partner_labels = self._augmented(step, (self._positions + ahead) % self.batch_size)
            where = torch.from_numpy(self._positions).to(self.device)
            images, partner_weight = augment.mix(self.augmentation, images, partners, where, step, self.seed)
        return Batch(images.to(self.dtype).permute(0, 3, 1, 2), labels, partner_labels, partner_weight)


def _normalisation(mean: Sequence[float], std: Sequence[float], device) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift, float32 [3], that take bytes to normalised values."""
    mean, std = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
    return (1 / (255 * std)).float().to(device), (-mean / std).float().to(device)


def evaluation_batches(
    images: numpy.ndarray,
    labels: numpy.ndarray,
    *,
    batch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The images [N, H, W, 3], uint8, in order and un-augmented: (images [n, 3, H, W] channels-last, labels [n])."""
    scale, shift = _normalisation(mean, std, device)
    for start in range(0, len(images), batch_size):
        part = torch.from_numpy(images[start : start + batch_size]).to(device)
        values = torch.addcmul(shift, part.float(), scale).to(dtype).permute(0, 3, 1, 2)
        yield values, torch.from_numpy(labels[start : start + batch_size]).to(device)
