"""The resident loader: the whole set on the device as bytes, every batch a pure function of (seed, step, position)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy
import torch

from fastcifar import functional, validation
from fastcifar.data.augment import Augmentation
from fastcifar.data.shard import PLACEMENTS, ImageShard
from fastcifar.reference_augment import draw_views, normalisation, partner_shift, show_views

__all__ = ["Augmentation", "Batch", "Plan", "ResidentLoader", "evaluation_batches"]

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


class Plan(NamedTuple):
    """What makes a global batch: `step`, int64 [1]; `indices`, int64 [B]; for alternating flips `flips`, bool [B].

    The indices are into the whole set, or into `images`, uint8 [k, H, W, 3], and `labels`, int64 [k], where these are
    given: then only those are true that this rank's part of the batch needs.
    """

    step: torch.Tensor
    indices: torch.Tensor
    flips: torch.Tensor | None
    images: torch.Tensor | None = None
    labels: torch.Tensor | None = None


def _generator(seed: int, purpose: int, index: int) -> numpy.random.Generator:
    return numpy.random.Generator(numpy.random.Philox(key=[seed, (purpose << 40) | index]))


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
        impl: of the augmentations, as in `fastcifar.functional.augment`.
        placement: "replicated", the whole set in every process, or "sharded", a part of it, the images of each batch
            being exchanged; the batches are the same.

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
        impl: str = "auto",
        placement: str = "replicated",
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
        validation.check_augmentation("ResidentLoader", **augmentation.options, size=images.shape[1:3])
        validation.check_implementation("ResidentLoader", impl)
        self.batch_size, self.seed, self.augmentation = batch_size, seed, augmentation
        self.device, self.dtype, self.impl = torch.device(device), dtype, impl
        self._count, self._mean, self._std = len(images), tuple(mean), tuple(std)
        validation.choose("placement", placement, PLACEMENTS)
        self._shard = self._images = None
        if placement == "sharded" and world_size > 1:
            self._shard = ImageShard(images, rank, world_size, self.device)
        else:
            self._images = torch.from_numpy(numpy.ascontiguousarray(images)).to(self.device)
        self._labels = torch.from_numpy(labels).to(self.device)
        share = batch_size // world_size
        self._positions = rank * share, share  # the first, and how many
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

    def _chosen(self, step: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Image index and alternating flip of each position of the global batch."""
        indices, epochs = self._indices(step, numpy.arange(self.batch_size))
        flips = None
        if self._flip_half is not None:
            flips = torch.from_numpy((self._flip_half[indices] + epochs) % 2 == 1)
        return torch.from_numpy(indices), flips

    def plan(self, step: int) -> Plan:
        """What the batch of 0-based `step` is made of, on the host."""
        plan = Plan(torch.tensor([step]), *self._chosen(step))
        return plan if self._shard is None else self._with_images(plan, step)

    def _with_images(self, plan: Plan, step: int) -> Plan:
        """The plan with the images of this rank's part and of their partners, from where they lie."""
        first, count = self._positions
        needed = numpy.arange(self.batch_size).reshape(-1, count)  # [ranks, count]
        if self.augmentation.mixup or self.augmentation.cutmix:
            ahead = int(partner_shift(plan.indices, plan.step, self.seed))
            needed = numpy.concatenate([needed, (needed + ahead) % self.batch_size], 1)
        wanted = plan.indices.numpy()[needed]
        places = numpy.zeros(self.batch_size, numpy.int64)
        places[needed[first // count]] = numpy.arange(needed.shape[1])
        own = torch.from_numpy(wanted[first // count]).to(self.device)
        return plan._replace(
            indices=torch.from_numpy(places), images=self._shard.fetch(list(wanted)), labels=self._labels[own]
        )

    def render(self, plan: Plan) -> Batch:
        """The batch of a plan on the device. Nothing here waits for the device or depends on anything but the plan's
        tensors, so that a captured graph can be given new ones by copying into them."""
        first, count = self._positions
        source, labels = (self._images, self._labels) if plan.images is None else (plan.images, plan.labels)
        images, partners, partner_weight = functional.augment(
            source, plan.indices, step=plan.step, seed=self.seed, mean=self._mean, std=self._std, first=first,
            count=count, flips=plan.flips, random_flip=self.augmentation.hflip == "random", dtype=self.dtype,
            impl=self.impl, **self.augmentation.options,
        )  # fmt: skip
        partner_labels = None if partners is None else labels[partners]
        return Batch(images, labels[plan.indices[first : first + count]], partner_labels, partner_weight)

    def batch(self, step: int) -> Batch:
        """This rank's part of the global batch of 0-based `step`; the same at every call."""
        return self.render(Plan(*(None if t is None else t.to(self.device) for t in self.plan(step))))

    @property
    def views(self) -> int:
        """How many ways there are to crop and flip an image."""
        return (2 * self.augmentation.crop_pad + 1) ** 2 * (1 if self.augmentation.hflip == "off" else 2)

    def views_of(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Image index and number of its view of the global batch of 0-based `step`, int64 [B] each, on the host."""
        options, (indices, flips) = self.augmentation, self._chosen(step)
        where = torch.arange(self.batch_size)
        rows, columns, flips = draw_views(where, step, self.seed, options.crop_pad, options.hflip == "random", flips)
        span = 2 * options.crop_pad + 1
        view = rows * span + columns
        return indices, view if flips is None else view + flips * span**2

    def view_images(self, index: torch.Tensor, view: torch.Tensor) -> torch.Tensor:
        """Views by number of the images with these indices, [n, 3, H, W]: cropped, flipped and normalised."""
        options, (scale, shift) = self.augmentation, normalisation(self._mean, self._std)
        span = 2 * options.crop_pad + 1
        index, view = index.to(self.device), view.to(self.device)
        views = view // span % span, view % span, view >= span**2
        shown = show_views(self._images, index, views, options.crop_pad, options.crop_mode).float()
        scale, shift = (torch.tensor(numbers, device=self.device) for numbers in (scale, shift))
        return torch.addcmul(shift, shown, scale).to(self.dtype).permute(0, 3, 1, 2)


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
    scale, shift = (torch.tensor(numbers, device=device) for numbers in normalisation(mean, std))
    for start in range(0, len(images), batch_size):
        part = torch.from_numpy(images[start : start + batch_size]).to(device)
        values = torch.addcmul(shift, part.float(), scale).to(dtype).permute(0, 3, 1, 2)
        yield values, torch.from_numpy(labels[start : start + batch_size]).to(device)
