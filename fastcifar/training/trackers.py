"""Services that also get the metrics: TensorBoard and Weights & Biases."""

from __future__ import annotations

import importlib
import pathlib
from collections.abc import Callable
from typing import Any

from fastcifar.training.options import Recipe

_MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}


def check(recipe: Recipe) -> None:
    """Raises ValueError with the line that installs what is missing."""
    for name, module in _MODULES.items():
        if getattr(recipe, name):
            try:
                importlib.import_module(module)
            except ImportError as error:
                raise ValueError(
                    f"--{name}: the package cannot be imported; run `pip install 'fastcifar[{name}]'`"
                ) from error


def open_trackers(
    recipe: Recipe, folder: pathlib.Path, config: dict[str, Any]
) -> list[Callable[[dict[str, Any]], None]]:
    """Functions that take a row of metrics each, one for each service that the recipe names."""
    trackers: list[Callable[[dict[str, Any]], None]] = []
    if recipe.tensorboard:
        writer = importlib.import_module(_MODULES["tensorboard"]).SummaryWriter(str(folder / "tensorboard"))

        def to_tensorboard(row: dict[str, Any]) -> None:
            for name, value in _numbers(row).items():
                writer.add_scalar(name, value, row["step"])
            writer.flush()

        trackers.append(to_tensorboard)
    if recipe.wandb:
        run = importlib.import_module(_MODULES["wandb"]).init(
            project="fastcifar", name=folder.name, dir=str(folder), config=config, resume="allow"
        )
        trackers.append(lambda row: run.log(_numbers(row), step=row["step"]))
    return trackers


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in row.items() if name != "step" and value is not None}
