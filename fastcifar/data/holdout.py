"""Part of the training images in place of the test images, for choices that must not see the latter."""

from __future__ import annotations

import dataclasses

import numpy

from fastcifar.data.dataset import DataError, ImageDataset


def hold_out(dataset: ImageDataset, count: int) -> ImageDataset:
    """The data set without `count` of its training images, which become its test images.

    The split is the same at every call, and each class gives its share. Images are normalised as those of the whole
    set, so that a network sees all sets alike.

    Raises:
        DataError: not enough training images.
    """
    if count == 0:
        return dataset
    total = len(dataset.train_labels)
    if not 0 < count < total:
        raise DataError(f"--holdout {count}: must be below the {total} training images of {dataset.name}")
    order = numpy.random.Generator(numpy.random.Philox(key=0)).permutation(total)
    position = numpy.empty(total)
    for label in range(dataset.num_classes):
        members = order[dataset.train_labels[order] == label]
        position[members] = (numpy.arange(len(members)) + 0.5) / max(len(members), 1)
    # The first of each class; order parts those of equal position.
    ranked = order[numpy.argsort(position[order], kind="stable")]
    held, kept = numpy.sort(ranked[:count]), numpy.sort(ranked[count:])
    notice = f"tested on {count:,} images held out of the {total:,} training images; the test images are not used"
    split = dataclasses.replace(
        dataset,
        name=f"{dataset.name}-holdout{count}",
        train_images=dataset.train_images[kept],
        train_labels=dataset.train_labels[kept],
        test_images=dataset.train_images[held],
        test_labels=dataset.train_labels[held],
        notices=(*dataset.notices, notice),
    )
    split.__dict__["_moments"] = dataset._moments
    return split
