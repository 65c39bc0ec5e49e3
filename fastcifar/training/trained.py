"""A trained classifier with everything that belongs to it, out of its checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from fastcifar import data, models
from fastcifar.training import checkpoint, classify, loop
from fastcifar.training.options import Recipe


class Trained(NamedTuple):
    """`model` in eval mode on the CPU, the recipe of its run, the data set with its classes, and the checkpoint."""

    model: nn.Module
    recipe: Recipe
    dataset: data.ImageDataset
    saved: checkpoint.Checkpoint


def read_recipe(saved: checkpoint.Checkpoint) -> Recipe:
    """The recipe of a checkpoint's run, for any device here.

    Raises:
        CheckpointError: it holds none.
    """
    return Recipe(**{**loop.read_config(saved), "impl": "auto", "device": "auto"})


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
    recipe = read_recipe(saved)
    if recipe.model in models.list_models(gan=True):
        raise checkpoint.CheckpointError(f"{saved.path} holds the GAN {recipe.model}; a classifier is needed here")
    images = data.load_dataset(dataset or recipe.dataset, data_dir or recipe.data_dir)
    for notice in images.notices:
        notify(notice)
    model = classify.build_model(recipe, images)
    classify.load_weights(model, saved)
    return Trained(model.eval(), recipe, images, saved)
