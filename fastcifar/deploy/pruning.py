"""Smaller networks out of trained ones: channels that batch norm hardly lets through, single weights near zero."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils import prune

from fastcifar.models.ds_resnet import InvertedResidualBlock, ResidualBlock
from fastcifar.models.modify_resnet import ProjectedBlock
from fastcifar.nn import DepthwiseConvBNAct

# Where the channels inside a block are made, normalised, convolved one by one (or not) and read.
_PLACES = {
    ResidualBlock: ("first.pointwise", "first.norm", "second.depthwise", "second.pointwise"),
    InvertedResidualBlock: ("expand.conv", "expand.norm", "depthwise", "project.conv"),
    ProjectedBlock: ("first.conv", "first.norm", None, "second.conv"),
}
# Vector units like whole groups of channels.
_GROUP = 8


class Inner(NamedTuple):
    """The path of a block, and the paths in it of what its inner channels go through."""

    block: str
    made: str
    norm: str
    depthwise: str | None
    read: str


def inner_channels(model: nn.Module) -> list[Inner]:
    """The blocks whose inner channels can go, in order: those that no residual stream ties to other blocks.

    Raises:
        ValueError: the network has none.
    """
    found = [Inner(name, *_PLACES[type(module)]) for name, module in model.named_modules() if type(module) in _PLACES]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no blocks with inner channels to prune; ds_resnet, ds_resnet_x2 and "
            "modify_resnet have; use --method unstructured or int8"
        )
    return found


def kept_channels(model: nn.Module, amount: float) -> list[torch.Tensor]:
    """Indices of the inner channels of each block that stay, int64 and rising.

    All inner channels of the network are ranked by |γ| of their batch norm; of the lowest share `amount` goes, but each
    block keeps a multiple of 8 channels (all of them below 8).

    Source: Liu et al., Learning efficient convolutional networks through network slimming, 2017.
    """
    strengths = [_part(model, inner, inner.norm).weight.detach().abs().float() for inner in inner_channels(model)]
    everything = torch.cat(strengths).sort().values
    threshold = everything[min(int(amount * len(everything)), len(everything) - 1)]
    kept = []
    for strength in strengths:
        count = int((strength >= threshold).sum())
        count = min(len(strength), max(_GROUP, -(-count // _GROUP) * _GROUP))
        kept.append(strength.argsort(descending=True, stable=True)[:count].sort().values)
    return kept


def _part(model: nn.Module, inner: Inner, path: str) -> nn.Module:
    return model.get_submodule(f"{inner.block}.{path}")


def pruned_state(model: nn.Module, kept: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict of the same network whose blocks have just these inner channels (`inner_widths` their numbers)."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for inner, indices in zip(inner_channels(model), kept, strict=True):
        for path in (inner.made, inner.norm, inner.depthwise):
            if path is not None:
                for name, tensor in _part(model, inner, path).state_dict().items():
                    if tensor.dim():
                        state[f"{inner.block}.{path}.{name}"] = tensor[indices].clone()
        # Channels along the second dimension: what reads them.
        name = f"{inner.block}.{inner.read}.weight"
        state[name] = state[name][:, indices].clone()
    return state


def _weights(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    for module in model.modules():
        if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear, DepthwiseConvBNAct)):
            yield module, "weight"


def zero_weights(model: nn.Module, amount: float) -> None:
    """Sets the share `amount` of all weights of convolutions and linear layers to zero, those nearest to it, in place.

    Source: Han et al., Learning both weights and connections for efficient neural networks, 2015.
    """
    # torch ranks them by views of one dimension.
    model.to(memory_format=torch.contiguous_format)
    prune.global_unstructured(list(_weights(model)), prune.L1Unstructured, amount=amount)
    _remove_masks(model)


@contextlib.contextmanager
def zeros_held(model: nn.Module) -> Iterator[None]:
    """Weights of convolutions and linear layers that are zero stay zero, whatever training does meanwhile."""
    for module, name in _weights(model):
        prune.custom_from_mask(module, name, (getattr(module, name) != 0).float())
    try:
        yield
    finally:
        _remove_masks(model)


def _remove_masks(model: nn.Module) -> None:
    for module, name in _weights(model):
        prune.remove(module, name)


def nonzero(model: nn.Module) -> int:
    """How many parameters are not zero."""
    return sum(int((parameter != 0).sum()) for parameter in model.parameters())
