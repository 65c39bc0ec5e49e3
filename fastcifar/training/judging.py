"""Judging a generator: its samples against real images, in the features of a named network."""

from __future__ import annotations

from typing import Any

import numpy
import torch
from torch import nn

from fastcifar import data, metrics, models
from fastcifar.data.download import cache_folder
from fastcifar.training import checkpoint as checkpoints
from fastcifar.training import sampling
from fastcifar.training.networks import trained_classifier

# A set of real images of the usual size; with fewer samples the distances are biased upwards.
_USUAL = 10_000


class Judge:
    """Metrics of samples in the features of one network, against the real images of one split.

    Args:
        extractor: images uint8 [n, H, W, 3] → features.
        dataset: of the real images.
        wanted: names of `metrics.METRICS`.
        count: samples.
        split: "test" or "train".

    Raises:
        ValueError: "prdc" of too few samples or images.
    """

    def __init__(self, extractor: Any, dataset: data.ImageDataset, wanted: tuple[str, ...], count: int, split="test"):
        self.extractor, self.wanted, self.count, self.split = extractor, wanted, count, split
        images = getattr(dataset, f"{split}_images")
        if "prdc" in wanted and min(count, len(images)) <= metrics.NEIGHBOURS:
            raise ValueError(
                f"prdc needs more than {metrics.NEIGHBOURS} samples and {split} images, got {count} and {len(images)}; "
                "drop it from --metrics"
            )
        self.reference = metrics.Reference.of_images(extractor, images, cache_folder())

    def describe(self) -> dict[str, Any]:
        """What the figures rest on."""
        return {
            "extractor": self.extractor.name,
            "extractor_sha256": self.extractor.digest,
            "reference": f"{self.reference.statistics.count} {self.split} images",
            "samples": self.count,
            "resize": self.extractor.resize,
        }

    def check_same(self, checkpoint: checkpoints.Checkpoint) -> None:
        """Figures of one run must be of one network, or they cannot be compared.

        Raises:
            CheckpointError: the run's samples were judged by another network so far.
        """
        before, now = checkpoint.state.get("extractor_sha256"), self.extractor.digest
        if before is not None and before != now:
            raise checkpoints.CheckpointError(
                f"{checkpoint.path}: its samples were judged by a network of SHA-256 {before[:12]}…, that of "
                f"--classifier is {now[:12]}…; pass the same one, or none"
            )

    def warnings(self) -> list[str]:
        """What makes the figures worse than the generator is."""
        few = min(self.count, self.reference.statistics.count)
        if few >= _USUAL or not {"fd", "fid"} & set(self.wanted) or len(self.reference.features) < 4:
            return []
        return [
            f"WARNING: {few} images are few for a Fréchet distance of {self.extractor.dimension} features: it is "
            f"biased upwards (so many real images are {self.reference.floor(few):.3g} away from the other real ones); "
            f"give both sides {_USUAL} or more"
        ]

    def metrics(self, generator: nn.Module, gan: models.GAN, seed: int = 0) -> dict[str, float]:
        """The wanted metrics of so many fresh samples."""
        device = self.extractor.device
        batches = (images for images, _ in sampling.sample_batches(generator, gan, self.count, device, seed))
        return metrics.compare(self.extractor, self.reference, batches, self.wanted)


def build_judge(
    dataset: data.ImageDataset,
    device: torch.device,
    wanted: tuple[str, ...],
    *,
    classifier: str | None,
    inception: str | None = None,
    count: int = _USUAL,
    split: str = "test",
) -> Judge:
    """A judge by the classifier whose run is given, else by the Inception network of the published FIDs.

    Args:
        wanted: names of `EXTRACTED`; "fid" is "fd" in Inception features.
        classifier: path of a classifier's run or checkpoint.
        inception: path of the Inception network's weights, where they are not in the cache.

    Raises:
        ValueError: a classifier that cannot be read, or with "fid"; Inception weights that cannot be had; "prdc" of too
            few images.
    """
    if classifier is None:
        try:
            extractor: Any = metrics.InceptionFeatures(inception, device)
        except ValueError as error:
            raise ValueError(f"{error}; a classifier trained here judges without it: --classifier RUN") from error
    elif "fid" in wanted:
        raise ValueError(
            f"fid is by definition a distance of Inception features; with --classifier {classifier} ask for fd, or "
            "drop --classifier"
        )
    else:
        extractor = classifier_features(classifier, dataset, device)
    return Judge(extractor, dataset, wanted, count, split)


def nearest_training_images(
    lpips: metrics.Lpips, gan: models.GAN, dataset: data.ImageDataset, count: int, *, neighbours: int, seed: int = 0
) -> tuple[dict[str, Any], numpy.ndarray]:
    """How far `count` samples are from the training images: smaller than what test images are means copies.

    Returns:
        The mean LPIPS of a sample to its nearest training image, that of as many test images, and what both rest on;
        and for each sample a row of itself and its nearest training images, uint8 [count·(neighbours + 1), H, W, 3].
    """
    batches = [batch for batch, _ in sampling.sample_batches(gan.generator, gan, count, lpips.device, seed)]
    generated = numpy.concatenate(batches)
    found = metrics.nearest_neighbours(lpips, generated, dataset.train_images, count=neighbours)
    order = metrics.selection(len(dataset.test_images), count)
    yardstick = metrics.nearest_neighbours(lpips, dataset.test_images[order], dataset.train_images)
    figures = {
        "lpips_nn": round(float(found.distances[:, 0].mean()), 6),
        "lpips_nn_of_test_images": round(float(yardstick.distances.mean()), 6),
        "lpips_network": lpips.name,
        "lpips_sha256": lpips.digest,
        "lpips_samples": count,
        "lpips_reference": f"{len(dataset.train_images)} train images",
        "lpips_resize": "none",
    }
    return figures, metrics.neighbour_rows(generated, dataset.train_images, found.indices)


def classifier_features(path: str, dataset: data.ImageDataset, device: torch.device) -> metrics.ClassifierFeatures:
    """The penultimate features of the classifier whose checkpoint or run is at `path`.

    Raises:
        ValueError: there is none, it is a GAN's, or of another number of classes.
    """
    found = trained_classifier("--classifier", path, dataset)
    return metrics.ClassifierFeatures(
        found.network.to(device), found.mean, found.std, name=f"classifier {found.name}", digest=found.digest
    )
