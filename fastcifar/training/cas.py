"""Classification accuracy score: a classifier trained on generated images alone, tested on real ones."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy
import torch
from torch import nn

from fastcifar import data, models
from fastcifar.training import distributed, recipe, sampling
from fastcifar.training.classify import Classification

# The classifier and its training: the demo preset, whose accuracy on real images the README has.
MODEL, PRESET = "ds_resnet", "demo"


def classification_accuracy_score(
    generator: nn.Module,
    gan: models.GAN,
    dataset: data.ImageDataset,
    count: int,
    device: torch.device,
    *,
    seed: int = 0,
    steps: int | None = None,
) -> dict[str, Any]:
    """Accuracy (percent) on the real test images of a classifier trained on `count` samples and their classes.

    Args:
        generator: of the conditional `gan`, as it is evaluated.
        dataset: the real images.
        count: samples; at least one a class is needed, 50,000 are usual.
        seed: of the samples and the classifier.
        steps: of the classifier, 128 images each; default: the preset's 1,600.

    Returns:
        "cas" and "cas_classifier", which says what was trained.

    Raises:
        ValueError: the GAN knows no classes.

    Source: Ravuri and Vinyals, Classification accuracy score for conditional generative models, 2019.
    """
    if not gan.conditional:
        raise ValueError("cas trains a classifier on the classes of the samples; this GAN was trained without classes")
    images, labels = [], []
    for batch, classes in sampling.sample_batches(generator, gan, count, device, seed):
        images.append(batch)
        labels.append(classes.cpu().numpy())
    generated = dataclasses.replace(
        dataset,
        train_images=numpy.concatenate(images),
        train_labels=numpy.concatenate(labels),
        source=f"{count} samples",
    )
    flags = {"model": MODEL, "preset": PRESET, "seed": seed} | ({"steps": steps} if steps else {})
    chosen = recipe.with_budget(recipe.resolve(flags, has_gpu=device.type == "cuda"), count)
    task = Classification(chosen, generated, device, distributed.Processes())
    for step in range(chosen.steps):
        task.train_step(step)
    if int(task.bad_steps):
        raise ValueError(f"cas: the classifier's loss was not finite in {int(task.bad_steps)} steps")
    what = f"{MODEL}, preset {PRESET}, {chosen.steps} steps of {chosen.batch_size}, trained on {count} samples"
    return {"cas": round(task.evaluate("test").accuracy, 4), "cas_classifier": what}
