"""Wide residual network of 46,203,236 parameters (batch-norm statistics counted)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fastcifar.models.layers import ConvBNAct, Head, check_inner, check_stages


class ProjectedBlock(nn.Module):
    """Two 3×3 convolutions beside a 1×1 convolution, all with bias and BN, added and activated."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, activation: str, inner: int | None = None):
        super().__init__()
        inner = inner or out_channels
        self.first = ConvBNAct(in_channels, inner, 3, stride, activation, bias=True)
        self.second = ConvBNAct(inner, out_channels, 3, 1, activation, bias=True)
        self.shortcut = ConvBNAct(in_channels, out_channels, 1, stride, "none", bias=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x), self.shortcut(x))


class ModifyResNet(nn.Module):
    """Stem, stages of two projected blocks, global average pool, dropout, linear classifier."""

    def __init__(
        self,
        num_classes: int,
        widths: Sequence[int],
        strides: Sequence[int],
        activation: str,
        dropout: float,
        inner_widths: Sequence[int] | None,
    ):
        super().__init__()
        check_stages("modify_resnet", widths, strides)
        inner = iter(check_inner("modify_resnet", inner_widths, 2 * len(widths)))
        self.stem = ConvBNAct(3, widths[0], 3, 1, activation, bias=True)
        stages, channels = [], widths[0]
        for width, stride in zip(widths, strides, strict=True):
            stages.append(ProjectedBlock(channels, width, stride, activation, next(inner)))
            stages.append(ProjectedBlock(width, width, 1, activation, next(inner)))
            channels = width
        self.stages = nn.Sequential(*stages)
        self.head = Head(channels, num_classes, dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, 3, H, W] → logits [N, num_classes]."""
        return self.head(self.stages(self.stem(x)))


def modify_resnet(
    num_classes: int = 100,
    *,
    widths: Sequence[int] = (128, 256, 512, 1024),
    strides: Sequence[int] = (1, 2, 2, 2),
    activation: str = "relu",
    dropout: float = 0.5,
    inner_widths: Sequence[int] | None = None,
) -> ModifyResNet:
    """46,203,236 parameters with 100 classes, running mean and variance included.

    Args:
        num_classes: size of the output.
        widths, strides: of the stages, two blocks each; the stride is the first block's.
        activation: see `fastcifar.nn.DepthwiseConvBNAct`.
        dropout: probability before the classifier.
        inner_widths: channels inside each block, between its two convolutions; None for a stage's own.

    Raises:
        ValueError: an option out of range.
    """
    return ModifyResNet(num_classes, widths, strides, activation, dropout, inner_widths)
