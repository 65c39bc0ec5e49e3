"""Depthwise-separable residual network of 94,372 parameters, its double width and its variants."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fastcifar import validation
from fastcifar.models.layers import ConvBNAct, Head, check_inner, check_stages
from fastcifar.nn import BatchNormAct, DepthwiseConvBNAct

BLOCKS = ("residual", "inverted-residual")
_EXPANSION = 4


def _shortcut(in_channels: int, out_channels: int, stride: int, impl: str) -> nn.Module:
    if in_channels == out_channels and stride == 1:
        return nn.Identity()
    return ConvBNAct(in_channels, out_channels, 1, stride, "none", impl=impl)


class DepthwiseSeparable(nn.Module):
    """Depthwise 3×3 → BN → activation → pointwise 1×1 → BN (+ residual) → activation."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, activation: str, impl: str):
        super().__init__()
        self.depthwise = DepthwiseConvBNAct(in_channels, 3, stride, activation=activation, impl=impl)
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.norm = BatchNormAct(out_channels, activation, impl=impl)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        return self.norm(self.pointwise(self.depthwise(x)), residual)


class ResidualBlock(nn.Module):
    """Two depthwise-separable convolutions and a shortcut; activation after the first and after the addition."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, activation: str, impl: str, inner: int | None = None
    ):
        super().__init__()
        inner = inner or out_channels
        self.first = DepthwiseSeparable(in_channels, inner, stride, activation, impl)
        self.second = DepthwiseSeparable(inner, out_channels, 1, activation, impl)
        self.shortcut = _shortcut(in_channels, out_channels, stride, impl)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x), self.shortcut(x))


class InvertedResidualBlock(nn.Module):
    """Expand 1×1 → depthwise 3×3 → linear projection 1×1, and a shortcut (Sandler et al., MobileNetV2, 2018)."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, activation: str, impl: str, inner: int | None = None
    ):
        super().__init__()
        hidden = inner or in_channels * _EXPANSION
        self.expand = ConvBNAct(in_channels, hidden, 1, 1, activation, impl=impl)
        self.depthwise = DepthwiseConvBNAct(hidden, 3, stride, activation=activation, impl=impl)
        self.project = ConvBNAct(hidden, out_channels, 1, 1, "none", impl=impl)
        self.shortcut = _shortcut(in_channels, out_channels, stride, impl)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.project(self.depthwise(self.expand(x)), self.shortcut(x))


class DSResNet(nn.Module):
    """Stem, one block a stage, global average pool, linear classifier."""

    def __init__(
        self,
        num_classes: int,
        width: float,
        strides: Sequence[int],
        activation: str,
        block: str,
        impl: str,
        inner_widths: Sequence[int] | None,
    ):
        super().__init__()
        if not width > 0:
            raise ValueError(f"ds_resnet: width must be > 0, got {width!r}")
        validation.choose("block", block, BLOCKS)
        build = ResidualBlock if block == "residual" else InvertedResidualBlock
        widths = [max(1, round(channels * width)) for channels in (32, 64, 96, 128)]
        check_stages("ds_resnet", widths, strides)
        inner = check_inner("ds_resnet", inner_widths, len(widths))
        self.stem = ConvBNAct(3, widths[0], 3, 1, activation, impl=impl)
        stages, channels = [], widths[0]
        for stage_width, stride, inner_width in zip(widths, strides, inner, strict=True):
            stages.append(build(channels, stage_width, stride, activation, impl, inner_width))
            channels = stage_width
        self.stages = nn.Sequential(*stages)
        self.head = Head(channels, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, 3, H, W] → logits [N, num_classes]."""
        return self.head(self.stages(self.stem(x)))


def ds_resnet(
    num_classes: int = 100,
    *,
    width: float = 1.0,
    strides: Sequence[int] = (1, 2, 2, 2),
    activation: str = "relu",
    block: str = "residual",
    inner_widths: Sequence[int] | None = None,
    impl: str = "auto",
) -> DSResNet:
    """94,372 parameters with 100 classes; stages of 32, 64, 96, 128 channels times `width`.

    Args:
        num_classes: size of the output.
        width: factor on every stage's channels.
        strides: of the four stages.
        activation: see `fastcifar.nn.DepthwiseConvBNAct`.
        block: "residual" (two depthwise-separable convolutions) or "inverted-residual" (linear bottleneck).
        inner_widths: channels inside each block, between its two layers; None for a stage's own, or four times the
            input's with inverted residuals.
        impl: implementation of the fused operators.

    Raises:
        ValueError: an option out of range.
    """
    return DSResNet(num_classes, width, strides, activation, block, impl, inner_widths)


def ds_resnet_x2(
    num_classes: int = 100,
    *,
    strides: Sequence[int] = (1, 2, 2, 2),
    activation: str = "relu",
    block: str = "residual",
    inner_widths: Sequence[int] | None = None,
    impl: str = "auto",
) -> DSResNet:
    """`ds_resnet` with twice the channels: 334,052 parameters with 100 classes."""
    return DSResNet(num_classes, 2.0, strides, activation, block, impl, inner_widths)
