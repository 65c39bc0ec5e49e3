"""Transfer: the phases of a run, a frozen backbone, and first weights that come from elsewhere."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from fastcifar import models
from fastcifar.data.tensors import read_tensors
from fastcifar.models.xception import published_weights
from fastcifar.training import checkpoint
from fastcifar.training.checkpoint import CheckpointError
from fastcifar.training.networks import load_weights, network_of, warn_of_seen_images
from fastcifar.training.options import Recipe

PUBLISHED = "imagenet"


class Phase(NamedTuple):
    """The steps from `start` to before `stop`: their factor on the learning rate, and whether only the head trains."""

    start: int
    stop: int
    factor: float
    frozen: bool


def read_phases(text: str) -> list[tuple[float, float, bool]]:
    """--phases as (length, factor, frozen) of each.

    Raises:
        ValueError: not of the form LENGTH:FACTOR or LENGTH:FACTOR:frozen, with commas between.
    """
    found = []
    for part in text.split(","):
        length, _, rest = part.strip().partition(":")
        factor, _, word = rest.partition(":")
        try:
            numbers = float(length), float(factor)
        except ValueError:
            numbers = (0.0, 0.0)
        if not all(0 < number < math.inf for number in numbers) or word not in ("", "frozen"):
            raise ValueError(
                f"--phases {text!r}: {part.strip()!r} must be LENGTH:FACTOR or LENGTH:FACTOR:frozen, numbers above 0"
            )
        found.append((*numbers, word == "frozen"))
    return found


def phases(text: str | None, steps: int) -> tuple[Phase, ...]:
    """The phases of a run of so many steps; their lengths are shares of it, whatever their unit."""
    parts = read_phases(text) if text else [(1.0, 1.0, False)]
    total, begun, found = sum(length for length, _, _ in parts), 0.0, []
    for length, factor, frozen in parts:
        start, begun = round(steps * begun / total), begun + length
        found.append(Phase(start, round(steps * begun / total), factor, frozen))
    return tuple(found)


def phase_at(parts: tuple[Phase, ...], step: int) -> Phase:
    """The phase that a 0-based step belongs to; beyond the last step, the last one."""
    return next((phase for phase in parts if phase.start <= step < phase.stop), parts[-1])


def freeze(model: nn.Module, frozen: bool) -> None:
    """Freezes or frees all but the head: no gradients, and in evaluation mode, so that no statistics move either."""
    for part in models.backbone(model).values():
        part.requires_grad_(not frozen).train(not frozen)


def read_backbone(source: str, model: str, recipe: Recipe | None = None) -> dict[str, torch.Tensor]:
    """Tensors that a backbone may begin with.

    Args:
        source: a run or checkpoint, a file of tensors (.safetensors, or .pth of torch.save), or "imagenet" for the
            published weights of `model`.
        model: name of the network that they are for.
        recipe: of the run that begins with them, which may hold out images that they know.

    Raises:
        ValueError: there are none, they cannot be read, or "imagenet" for a network that has no such weights.
    """
    path = pathlib.Path(source)
    if source == PUBLISHED:
        if model != "xception":
            raise ValueError(f"--backbone {PUBLISHED} is for --model xception; for {model} give a run or a file")
        try:
            path = published_weights()
        except ValueError as error:
            raise ValueError(f"{error}, or give a copy of the file: --backbone FILE") from error
    if path.is_file():
        return read_tensors(path.read_bytes(), str(path))
    saved = checkpoint.find(path, notify=print)
    if recipe is not None:
        warn_of_seen_images("--backbone", saved, recipe.dataset, recipe.holdout)
    return network_of(saved)


def load_backbone(model: nn.Module, tensors: dict[str, torch.Tensor], source: str) -> None:
    """Puts tensors into all of the model but its head; what is the tensors' own head is left out.

    Raises:
        CheckpointError: they are another network's; the message names the first difference.
    """
    parts = models.backbone(model)
    expected = {n: t for n, t in model.state_dict().items() if n.split(".")[0] in parts}
    if set(parts) == {"backbone"} and not any(name.startswith("backbone.") for name in tensors):
        tensors = {f"backbone.{name}": tensor for name, tensor in tensors.items()}
    for name, tensor in expected.items():
        found = tensors.get(name)
        if found is None and name.endswith("num_batches_tracked"):
            continue  # older files have none
        if found is None or found.shape != tensor.shape:
            has = "lacks it" if found is None else f"has shape {tuple(found.shape)}"
            raise CheckpointError(
                f"--backbone {source} is of another network: {name} has shape {tuple(tensor.shape)} here and {source} "
                f"{has}; check --model and its options"
            )
    model.load_state_dict({name: tensors[name] for name in expected if name in tensors}, strict=False)


def first_weights(recipe: Recipe, saved: checkpoint.Checkpoint | None) -> Callable[[Any], None]:
    """Reads the weights from elsewhere that a run begins with; returns what puts them into its task.

    Args:
        recipe: says which (`init_weights`, `backbone`).
        saved: the checkpoint that the run goes on from instead, if any.

    Raises:
        ValueError: they cannot be read.
    """
    source = backbone = None
    if saved is None and recipe.init_weights:
        source = checkpoint.find(recipe.init_weights, notify=print)
        warn_of_seen_images("--init-weights", source, recipe.dataset, recipe.holdout)
    if saved is None and recipe.backbone not in (None, "none"):
        backbone = read_backbone(recipe.backbone, recipe.model, recipe)

    def put(task: Any) -> None:
        if source is not None:
            load_weights(task.model, source)
        if backbone is not None:
            load_backbone(task.model, backbone, recipe.backbone)
        if source is not None or backbone is not None:
            task.restart_average()

    return put
