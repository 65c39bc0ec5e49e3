"""Names of models: creation, listing, options and parameter counts, with timm's function names."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from fastcifar import validation

_MODELS: dict[str, Callable[..., nn.Module]] = {}
_GANS: set[str] = set()


def register(name: str, build: Callable[..., nn.Module], *, gan: bool = False) -> None:
    """Adds a model: `build(num_classes=…, **options)`, every option with a default. A GAN builds a `models.gan.GAN`."""
    if name in _MODELS:
        raise ValueError(f"register: there is a model {name!r} already")
    _MODELS[name] = build
    if gan:
        _GANS.add(name)


def list_models(*, gan: bool | None = None) -> list[str]:
    """Names that `create_model` takes, sorted: all, only GANs, or only classifiers."""
    return sorted(name for name in _MODELS if gan is None or (name in _GANS) == gan)


def model_options(name: str) -> dict[str, Any]:
    """The model's options beside `num_classes`, with their defaults.

    Raises:
        ValueError: no model of that name.
    """
    parameters = inspect.signature(_MODELS[validation.choose("model", name, list_models())]).parameters
    return {key: parameter.default for key, parameter in parameters.items() if key != "num_classes"}


def create_model(name: str, num_classes: int = 100, **options: Any) -> nn.Module:
    """Builds a model with fresh weights from torch's global generator.

    Args:
        name: one of `list_models()`.
        num_classes: size of the output.
        **options: see `model_options(name)`.

    Returns:
        A module from float images [N, 3, H, W] (32×32 for all CIFAR models) to logits [N, num_classes]; of a GAN's
        name a `models.gan.GAN` of generator and discriminator.

    Raises:
        ValueError: an unknown model or option (the message names the nearest), or a value out of range.
    """
    known = model_options(name)
    for option in options:
        validation.choose(f"option of {name}", option, known)
        _check_kind(name, option, options[option], known[option])
    if not isinstance(num_classes, int) or num_classes < 1:
        raise ValueError(f"create_model: num_classes must be an int ≥ 1, got {num_classes!r}")
    return _MODELS[name](num_classes=num_classes, **options)


def _check_kind(name: str, option: str, value: Any, default: Any) -> None:
    """A value must be of the default's kind: true or false, a whole number, a number, a text, or a list of them.

    Where the default is None the model checks for itself.
    """
    if default is None:
        return
    kinds = {bool: bool, int: int, float: (int, float), str: str, tuple: (list, tuple)}
    fits = isinstance(value, kinds[type(default)]) and isinstance(value, bool) == isinstance(default, bool)
    if not fits:
        raise ValueError(f"{name}: {option} must be of the kind of {default!r}, got {value!r}")
    if isinstance(default, tuple):
        for part in value:
            _check_kind(name, f"each of {option}", part, default[0])


def count_parameters(model: nn.Module, convention: str = "torch") -> int:
    """Number of parameters.

    Args:
        model: any module.
        convention: "torch" counts `parameters()`; "keras" adds the running mean and variance of every batch
            normalisation, as Keras' `count_params()` does with its non-trainable weights; "spectral_norm" adds the
            vectors u and v of every spectral norm, as implementations do that keep them among the parameters.

    Raises:
        ValueError: another convention.
    """
    validation.choose("convention", convention, ("torch", "keras", "spectral_norm"))
    total = sum(parameter.numel() for parameter in model.parameters())
    if convention != "torch":
        suffixes = ("running_mean", "running_var") if convention == "keras" else ("._u", "._v")
        total += sum(buffer.numel() for name, buffer in model.named_buffers() if name.endswith(suffixes))
    return total
