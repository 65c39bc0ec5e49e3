"""All metrics of generated images against a reference, in one pass over the images."""

from __future__ import annotations

import hashlib
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy
import safetensors
import safetensors.torch
import torch

from fastcifar.metrics.frechet import FeatureStatistics, frechet_distance
from fastcifar.metrics.neighbours import kernel_distance, precision_recall_density_coverage

# "fid" is what "fd" is called in the features that the published distances are measured in.
METRICS = ("fd", "fid", "kid", "prdc")
# Features kept for the metrics that need them one by one.
_KEPT = 10_000
_BATCH = 250


def selection(total: int, count: int) -> numpy.ndarray:
    """Indices of at most `count` of `total` images, int64, the same ones each time, the first 10,000 a fair sample.

    The first images of a folder are all of its first classes.
    """
    if total <= min(count, _KEPT):
        return numpy.arange(total)
    return numpy.random.Generator(numpy.random.Philox(key=0)).permutation(total)[:count]


class Reference:
    """Statistics of all real images, and the features of 10,000 of them.

    Args:
        extractor: images uint8 [n, H, W, 3] → features [n, D]; has `dimension` and `device`.
        batches: the real images; the first 10,000 are those whose features are kept.
    """

    def __init__(self, extractor: Any, batches: Iterable[numpy.ndarray], *, keep: bool = True):
        self.statistics = FeatureStatistics(extractor.dimension, extractor.device)
        kept: list[torch.Tensor] = []
        for images in batches:
            features = extractor(images)
            self.statistics.update(features)
            if keep and sum(map(len, kept)) < _KEPT:
                kept.append(features)
        self.features = torch.cat(kept)[:_KEPT] if kept else torch.empty(0, extractor.dimension)

    @classmethod
    def of_images(cls, extractor: Any, images: numpy.ndarray, cache: pathlib.Path | None = None) -> Reference:
        """That of real images uint8 [N, H, W, 3].

        Args:
            extractor: has a `digest` and `settings` as well where there is a cache.
            images: all of them.
            cache: folder where it is looked up and kept, under the hashes of extractor and images.
        """
        place = None
        if cache is not None:
            content = f"{images.shape} selection {extractor.settings}".encode() + numpy.ascontiguousarray(images).data
            content = hashlib.sha256(content).hexdigest()
            place = cache / f"reference-{extractor.digest[:16]}-{content[:16]}.safetensors"
            if place.is_file() and (found := cls._read(extractor, place)) is not None:
                return found
        order = selection(len(images), len(images))
        made = cls(extractor, (images[order[begin : begin + _BATCH]] for begin in range(0, len(images), _BATCH)))
        if place is not None:
            made._write(place)
        return made

    @classmethod
    def _read(cls, extractor: Any, place: pathlib.Path) -> Reference | None:
        """What the file holds; None where it is damaged."""
        found = cls(extractor, ())
        try:
            state = safetensors.torch.load(place.read_bytes())
            found.features = state.pop("features").to(extractor.device)
            found.statistics.load_state(state)
        except (OSError, KeyError, ValueError, safetensors.SafetensorError):
            return None
        return found if found.features.shape[1:] == (extractor.dimension,) else None

    def _write(self, place: pathlib.Path) -> None:
        """A cache that cannot be written is none."""
        content = safetensors.torch.save({"features": self.features, **self.statistics.state()})
        work = place.with_name(f".{place.name}-{os.getpid()}")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            work.write_bytes(content)
            work.replace(place)
        except OSError:
            work.unlink(missing_ok=True)

    def floor(self, count: int) -> float:
        """The Fréchet distance of `count` real images (at most half of those kept) to the others: the bias of few."""
        order = torch.randperm(len(self.features), generator=torch.Generator().manual_seed(0))
        count = min(count, len(order) // 2)
        sides = []
        for chosen in (order[:count], order[count:]):
            statistics = FeatureStatistics(self.features.shape[1], self.features.device)
            statistics.update(self.features[chosen.to(self.features.device)])
            sides += [statistics.mean, statistics.covariance]
        return frechet_distance(*sides)


def compare(
    extractor: Any, reference: Reference, batches: Iterable[numpy.ndarray], wanted: Sequence[str]
) -> dict[str, float]:
    """The wanted metrics of generated images.

    Args:
        extractor: that of the reference.
        reference: of the real images.
        batches: the generated images, uint8 [n, H, W, 3]; seen once.
        wanted: names of `METRICS`.

    Returns:
        "fd" or "fid", "kid" and "kid_deviation", "precision", "recall", "density", "coverage", as wanted.

    Raises:
        ValueError: an unknown metric.
    """
    unknown = [name for name in wanted if name not in METRICS]
    if unknown:
        raise ValueError(f"unknown metric {unknown[0]!r} (there are: {', '.join(METRICS)})")
    distances = [name for name in wanted if name in ("fd", "fid")]
    generated = Reference(extractor, batches, keep=len(distances) < len(wanted))
    found: dict[str, float] = {}
    for name in distances:
        real, other = reference.statistics, generated.statistics
        found[name] = frechet_distance(real.mean, real.covariance, other.mean, other.covariance)
    if "kid" in wanted:
        found["kid"], found["kid_deviation"] = kernel_distance(reference.features, generated.features)
    if "prdc" in wanted:
        found |= precision_recall_density_coverage(reference.features, generated.features)
    return found
