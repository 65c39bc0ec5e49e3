"""All metrics of generated images against a reference, in one pass over the images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy
import torch

from fastcifar.metrics.frechet import FeatureStatistics, frechet_distance
from fastcifar.metrics.neighbours import kernel_distance, precision_recall_density_coverage

METRICS = ("fd", "kid", "prdc")
# Features kept for the metrics that need them one by one.
_KEPT = 10_000


class Reference:
    """Statistics of all real images, and the features of the first 10,000.

    Args:
        extractor: images uint8 [n, H, W, 3] → features [n, D]; has `dimension` and `device`.
        batches: the real images.
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
        "fd", "kid" and "kid_deviation", "precision", "recall", "density", "coverage", as wanted.

    Raises:
        ValueError: an unknown metric.
    """
    unknown = [name for name in wanted if name not in METRICS]
    if unknown:
        raise ValueError(f"unknown metric {unknown[0]!r} (there are: {', '.join(METRICS)})")
    generated = Reference(extractor, batches, keep=set(wanted) != {"fd"})
    found: dict[str, float] = {}
    if "fd" in wanted:
        real, other = reference.statistics, generated.statistics
        found["fd"] = frechet_distance(real.mean, real.covariance, other.mean, other.covariance)
    if "kid" in wanted:
        found["kid"], found["kid_deviation"] = kernel_distance(reference.features, generated.features)
    if "prdc" in wanted:
        found |= precision_recall_density_coverage(reference.features, generated.features)
    return found
