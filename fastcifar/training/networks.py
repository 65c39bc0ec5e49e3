"""Classifiers with the weights of a seed or of a checkpoint."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from fastcifar import data, models
from fastcifar.training import checkpoint as checkpoints
from fastcifar.training.checkpoint import Checkpoint, CheckpointError
from fastcifar.training.options import Recipe


def _create(name: str, options: Mapping[str, Any], dataset: data.ImageDataset, impl: str) -> nn.Module:
    model = models.create_model(name, num_classes=dataset.num_classes, **options)
    if hasattr(model, "normalised_by"):
        model.normalised_by(dataset.mean, dataset.std)
    for module in model.modules():
        if hasattr(module, "impl"):
            module.impl = impl
    return model


def build_model(recipe: Recipe, dataset: data.ImageDataset) -> nn.Module:
    """The recipe's network with the weights of its seed, on the CPU.

    Raises:
        ValueError: an unknown model, option or implementation.
    """
    torch.manual_seed(recipe.seed)
    return _create(recipe.model, recipe.model_options, dataset, recipe.impl)


def network_of(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint's network: its averaged weights, where it has them."""
    plain, averaged = (
        {n.removeprefix(prefix): t for n, t in checkpoint.tensors.items() if n.startswith(prefix)}
        for prefix in ("model.", "ema.")
    )
    if averaged and any(name.startswith("generator.") for name in plain):  # a GAN averages its generator alone
        return plain | {f"generator.{name}": tensor for name, tensor in averaged.items()}
    return averaged or plain


def moments(dataset: data.ImageDataset) -> dict[str, list[float]]:
    """What a checkpoint says of the images that its network was trained on: mean and deviation of each channel."""
    return {"mean": list(dataset.mean), "std": list(dataset.std)}


def check_same_images(checkpoint: Checkpoint, dataset: data.ImageDataset) -> None:
    """Another data set, such as --dataset auto may find, would be another run.

    Raises:
        CheckpointError: its images or classes are others than the run's so far.
    """
    now = moments(dataset)
    before = {name: checkpoint.state.get(name, value) for name, value in now.items()}
    if before != now:
        raise CheckpointError(
            f"{checkpoint.path} was trained on other images than {dataset.source}: their mean was {before['mean']}, "
            f"here it is {now['mean']}; give its data set"
        )
    known = checkpoint.state.get("class_names", list(dataset.class_names))
    if known != list(dataset.class_names):
        odd = next(pair for pair in itertools.zip_longest(known, dataset.class_names) if pair[0] != pair[1])
        raise CheckpointError(
            f"{checkpoint.path} knows other classes than {dataset.source}: {odd[0]!r} there is {odd[1]!r} here; give "
            "its data set"
        )


def as_trained(dataset: data.ImageDataset, checkpoint: Checkpoint) -> data.ImageDataset:
    """The data set, normalised as the one that a checkpoint's network was trained on (older ones do not say how)."""
    state = checkpoint.state
    return dataset.normalised_as(state["mean"], state["std"]) if "mean" in state else dataset


def load_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Puts a checkpoint's network (its averaged weights, where it has them) into the model.

    Raises:
        CheckpointError: it belongs to another network; the message names the first difference.
    """
    tensors, expected = network_of(checkpoint), model.state_dict()
    for name in sorted({*expected, *tensors}):
        if name not in tensors or name not in expected:
            where = "the checkpoint lacks" if name not in tensors else "the network has no"
            raise CheckpointError(f"{checkpoint.path} holds another network: {where} {name!r}; check --model")
        if expected[name].shape != tensors[name].shape:
            raise CheckpointError(
                f"{checkpoint.path} holds another network: {name!r} has shape {tuple(tensors[name].shape)} there and "
                f"{tuple(expected[name].shape)} here; check --model, its options and the data set's classes"
            )
    model.load_state_dict(tensors)


def warn_of_seen_images(option: str, source: Checkpoint, dataset: str, holdout: int) -> None:
    """Says so, in one process, where weights come from a run that trained on images which are held out here."""
    names = {"cifar100" if name == "auto" else name for name in (dataset, source.config.get("dataset", "auto"))}
    first = os.environ.get("RANK", "0") == "0"
    if first and len(names) == 1 and source.config.get("holdout", 0) < holdout:
        print(
            f"WARNING: {option} {source.path} was trained on images that --holdout {holdout} judges by, so the figures "
            f"are too good; train it with --holdout {holdout}, too",
            flush=True,
        )


class TrainedClassifier(NamedTuple):
    """A network in evaluation mode, without gradients, on the CPU; its name; SHA-256 of its tensors; how the images
    that it was trained on were normalised."""

    network: nn.Module
    name: str
    digest: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


def trained_classifier(
    option: str, path: str, dataset: data.ImageDataset, impl: str = "auto", *, holdout: int = 0
) -> TrainedClassifier:
    """The classifier of the run or checkpoint at `path`, which judges or teaches another network of this data set.

    Raises:
        ValueError: there is none, it is a GAN's, or it knows another number of classes; the message names `option`.
    """
    saved = checkpoints.find(path, notify=print)
    config = saved.config
    name = config["model"]
    if name in models.list_models(gan=True):
        raise ValueError(f"{saved.path} holds the GAN {name}; {option} needs a classifier's run")
    dataset = as_trained(dataset, saved)
    network = _create(name, config["model_options"], dataset, impl)
    last = [key for key, module in network.named_modules() if isinstance(module, nn.Linear)][-1]
    weight = network_of(saved).get(f"{last}.weight")
    if weight is not None and len(weight) != dataset.num_classes:
        raise ValueError(
            f"{option}: {saved.path} knows {len(weight)} classes, {dataset.name} has {dataset.num_classes}; give a "
            "classifier of the same classes"
        )
    load_weights(network, saved)
    warn_of_seen_images(option, saved, dataset.name.rpartition("-holdout")[0], holdout)
    digest = checkpoints.state_sha256({f"model.{key}": tensor for key, tensor in network.state_dict().items()})
    return TrainedClassifier(network.eval().requires_grad_(False), name, digest, dataset.mean, dataset.std)
