"""Pieces that several networks share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fastcifar import reference, validation
from fastcifar.nn import BatchNormAct


class Activation(nn.Module):
    """An activation by the name that the fused operators use."""

    def __init__(self, name: str):
        super().__init__()
        self.name = validation.choose("activation", name, validation.ACTIVATIONS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return reference.activate(x, self.name)

    def extra_repr(self) -> str:
        """The name, as `print(model)` shows it."""
        return self.name


class ConvBNAct(nn.Module):
    """Convolution → BN (+ residual) → activation; padding keeps the size at stride 1."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        activation: str = "relu",
        bias: bool = False,
        impl: str = "auto",
    ):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=bias)
        self.norm = BatchNormAct(out_channels, activation, impl=impl)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        return self.norm(self.conv(x), residual)


class Head(nn.Module):
    """Global average pool, dropout, linear classifier."""

    def __init__(self, channels: int, num_classes: int, dropout: float = 0.0):
        super().__init__()
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout!r}")
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.dropout(x.mean(dim=(2, 3))))


def check_stages(model: str, widths: Sequence[int], strides: Sequence[int]) -> None:
    """One stride per stage, all positive ints."""
    for name, values in (("widths", widths), ("strides", strides)):
        if not values or any(isinstance(v, bool) or not isinstance(v, int) or v < 1 for v in values):
            raise ValueError(f"{model}: {name} must be ints ≥ 1, got {tuple(values)}")
    if len(widths) != len(strides):
        raise ValueError(f"{model}: {len(widths)} widths {tuple(widths)} need as many strides, got {tuple(strides)}")


def check_inner(model: str, inner_widths: Sequence[int] | None, blocks: int) -> Sequence[int | None]:
    """One positive int for each block, or None for each."""
    if inner_widths is None:
        return [None] * blocks
    values = tuple(inner_widths) if isinstance(inner_widths, (tuple, list)) else (inner_widths,)
    if len(values) != blocks or any(isinstance(v, bool) or not isinstance(v, int) or v < 1 for v in values):
        raise ValueError(f"{model}: inner_widths must be {blocks} ints ≥ 1, one a block, got {values}")
    return values


def backbone(model: nn.Module) -> dict[str, nn.Module]:
    """All parts of a classifier but its head, by name: what a transfer takes over and may freeze.

    Raises:
        ValueError: no part is called "head" or "fc".
    """
    parts = dict(model.named_children())
    if not {"head", "fc"} & parts.keys():
        raise ValueError(f"{type(model).__name__} has no part called head or fc, so no backbone before it")
    return {name: part for name, part in parts.items() if name not in ("head", "fc")}
