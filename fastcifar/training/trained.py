"""A trained classifier with everything that belongs to it, out of its checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from fastcifar import data, models
from fastcifar.training import checkpoint, networks, recipe
from fastcifar.training.options import Recipe


class Trained(NamedTuple):
    """`model` in eval mode on the CPU, the recipe of its run, the data set with its classes and normalised as
    the network was trained, and the checkpoint."""

    model: nn.Module
    recipe: Recipe
    dataset: data.ImageDataset
    saved: checkpoint.Checkpoint


def load_classifier(
    path: str | os.PathLike,
    dataset: str | None = None,
    data_dir: str | None = None,
    *,
    notify: Callable[[str], None] = print,
) -> Trained:
    """The newest sound checkpoint at `path`, a checkpoint or a run folder; averaged weights where it has them.

    Args:
        path: of the checkpoint.
        dataset, data_dir: as `data.load_dataset` takes them; None for those of the run.
        notify: told of damaged checkpoints, and of what one must know of the data set.

    Raises:
        ValueError: no such checkpoint or data set, or it holds a GAN or another network.
    """
    saved = checkpoint.find(path, notify=notify)
    chosen = recipe.of_checkpoint(saved, impl="auto", device="auto")
    if chosen.model in models.list_models(gan=True):
        raise checkpoint.CheckpointError(f"{saved.path} holds the GAN {chosen.model}; a classifier is needed here")
    images = data.load_dataset(dataset or chosen.dataset, data_dir or chosen.data_dir)
    for notice in images.notices:
        notify(notice)
    images = networks.as_trained(images, saved)
    model = networks.build_model(chosen, images)
    networks.load_weights(model, saved)
    return Trained(model.eval(), chosen, images, saved)
