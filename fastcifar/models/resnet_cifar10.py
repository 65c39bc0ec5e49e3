"""Nine-layer residual network for CIFAR-10, in the spirit of the DAWNBench entries."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fastcifar.models.layers import ConvBNAct, check_stages


class PooledStage(nn.Module):
    """conv-BN-activation → 2×2 max-pool, with or without a residual pair of conv-BN-activation behind it."""

    def __init__(self, in_channels: int, out_channels: int, activation: str, residual: bool):
        super().__init__()
        self.conv = ConvBNAct(in_channels, out_channels, 3, 1, activation)
        self.pool = nn.MaxPool2d(2)
        pair = [ConvBNAct(out_channels, out_channels, 3, 1, activation) for _ in range(2)]
        self.residual = nn.Sequential(*pair) if residual else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.conv(x))
        return x if self.residual is None else x + self.residual(x)


class ResNetCIFAR10(nn.Module):
    """Stem, three pooled stages of which the first and the last have a residual pair, global max-pool, linear."""

    def __init__(self, num_classes: int, widths: Sequence[int], activation: str, logit_scale: float):
        super().__init__()
        if len(widths) != 4:
            raise ValueError(f"resnet_cifar10: widths must be four ints (stem and three stages), got {tuple(widths)}")
        check_stages("resnet_cifar10", widths, (1,) * 4)
        if not logit_scale > 0:
            raise ValueError(f"resnet_cifar10: logit_scale must be > 0, got {logit_scale!r}")
        self.stem = ConvBNAct(3, widths[0], 3, 1, activation)
        self.stages = nn.Sequential(
            *(PooledStage(widths[i], widths[i + 1], activation, residual=i != 1) for i in range(3))
        )
        self.fc = nn.Linear(widths[-1], num_classes, bias=False)
        self.logit_scale = logit_scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, 3, H, W] → logits [N, num_classes]."""
        return self.fc(self.stages(self.stem(x)).amax(dim=(2, 3))) * self.logit_scale


def resnet_cifar10(
    num_classes: int = 10,
    *,
    widths: Sequence[int] = (64, 128, 256, 512),
    activation: str = "relu",
    logit_scale: float = 0.125,
) -> ResNetCIFAR10:
    """6,573,120 parameters with 10 classes.

    Args:
        num_classes: size of the output.
        widths: channels of the stem and of the three stages.
        activation: see `fastcifar.nn.DepthwiseConvBNAct`.
        logit_scale: factor on the logits.

    Raises:
        ValueError: an option out of range.
    """
    return ResNetCIFAR10(num_classes, widths, activation, logit_scale)
