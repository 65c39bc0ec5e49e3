"""What every data set is: images and labels in memory, with their origin."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy


class DataError(ValueError):
    """A data set that is missing, damaged or not what it should be; one line that says what to do."""


@dataclass(frozen=True)
class ImageDataset:
    """A labelled set of images.

    Attributes:
        name: "cifar100", "cifar10", "synthetic", "folder:…" or "npz:…".
        train_images, test_images: uint8 [N, H, W, 3].
        train_labels, test_labels: int64 [N], in [0, num_classes).
        class_names: one for each label.
        synthetic: whether the images are the embedded stand-in.
        source: where they came from, for people.
        notices: what a user must know of this set.

    Raises:
        DataError: arrays that do not fit together.
    """

    name: str
    train_images: numpy.ndarray
    train_labels: numpy.ndarray
    test_images: numpy.ndarray
    test_labels: numpy.ndarray
    class_names: tuple[str, ...]
    synthetic: bool = False
    source: str = ""
    notices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for split in ("train", "test"):
            images, labels = getattr(self, f"{split}_images"), getattr(self, f"{split}_labels")
            if images.ndim != 4 or images.shape[3] != 3 or images.dtype != numpy.uint8:
                raise DataError(
                    f"{self.source}: {split} images must be uint8 of shape (N, H, W, 3), got {images.dtype} "
                    f"{images.shape}"
                )
            if labels.shape != images.shape[:1] or labels.dtype != numpy.int64:
                raise DataError(f"{self.source}: {split} has {len(images)} images but labels {labels.shape}")
            if len(images) == 0:
                raise DataError(f"{self.source}: {split} holds no images")
            if labels.min() < 0 or labels.max() >= len(self.class_names):
                raise DataError(
                    f"{self.source}: {split} labels lie in [{labels.min()}, {labels.max()}], must lie in "
                    f"[0, {len(self.class_names) - 1}]"
                )

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @functools.cached_property
    def _moments(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        sums = numpy.zeros((2, 3), numpy.uint64)
        for start in range(0, len(self.train_images), 1024):
            rows = self.train_images[start : start + 1024].reshape(-1, self.train_images[0].size)
            squares = numpy.multiply(rows, rows, dtype=numpy.uint16)
            for total, values in zip(sums, (rows, squares), strict=True):
                total += values.sum(0, dtype=numpy.uint32).reshape(-1, 3).sum(0, dtype=numpy.uint64)
        mean, square = sums / (self.train_images.size // 3) / numpy.array([[255.0], [255.0**2]])
        deviation = numpy.sqrt(numpy.maximum(square - mean**2, 0.0))
        return tuple(mean.tolist()), tuple(numpy.maximum(deviation, 1.0 / 255.0).tolist())

    def normalised_as(self, mean: Sequence[float], std: Sequence[float]) -> ImageDataset:
        """The same images with the mean and the deviation of other ones, those that a network was trained on."""
        other = dataclasses.replace(self)
        other.__dict__["_moments"] = (tuple(mean), tuple(std))
        return other

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of each channel of the training images, divided by 255."""
        return self._moments[0]

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of each channel of the training images, divided by 255; at least 1/255."""
        return self._moments[1]
