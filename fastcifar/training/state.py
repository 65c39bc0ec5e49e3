"""Optimiser states by name, as checkpoints hold them."""

from __future__ import annotations

import torch
from torch import nn


def _named_parameters(optimiser: torch.optim.Optimizer, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """In the optimiser's order."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [(names[p], p) for group in optimiser.param_groups for p in group["params"]]


def optimiser_tensors(optimiser: torch.optim.Optimizer, model: nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    """What the optimiser remembers of each parameter of the model, as "prefix.parameter.key"."""
    tensors = {}
    parameters = _named_parameters(optimiser, model)
    for index, values in optimiser.state_dict()["state"].items():
        for key, value in values.items():
            if value is not None:
                tensors[f"{prefix}.{parameters[index][0]}.{key}"] = torch.as_tensor(value)
    return tensors


def load_optimiser(optimiser: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Takes over what `optimiser_tensors` gave, its prefix removed."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for index, (name, parameter) in enumerate(_named_parameters(optimiser, model)):
        prefix = name + "."
        found = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
        values = {key: _laid_out_as(parameter, t) for key, t in found.items() if "." not in key}
        if values:
            state[index] = values
    groups = optimiser.state_dict()["param_groups"]
    optimiser.load_state_dict({"state": state, "param_groups": groups})


def _laid_out_as(parameter: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """A fused optimiser walks parameter and state by address, so their strides must agree."""
    if tensor.shape != parameter.shape:
        return tensor
    return torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)


def by_part(tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors by the first part of their names, which is removed."""
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = tensor
    return parts
