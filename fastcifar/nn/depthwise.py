"""Depthwise convolution + batch normalisation + activation as one module."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import nn

from fastcifar import functional, validation
from fastcifar.nn.batch_norm import advance_momentum


class DepthwiseConvBNAct(nn.Module):
    """A depthwise convolution without bias, batch normalisation and an activation, run as one operator.

    Input [N, channels, H, W], output [N, channels, H', W'], floating point; parameters and buffers as in
    `nn.Conv2d(channels, channels, kernel_size, groups=channels, bias=False)` and `nn.BatchNorm2d(channels)`, with the
    same initial values: `weight` [channels, 1, K, K], `bn_weight`, `bn_bias`, `running_mean`, `running_var`
    [channels], `num_batches_tracked` []. `torch.optim.swa_utils.update_bn` does not know it, so the statistics are not
    taken afresh there, but go on with `momentum`.

    Args:
        channels: number of input and output channels.
        kernel_size: K, in pixels.
        stride, dilation: in pixels.
        padding: in pixels; None keeps the size at stride 1 (`dilation · (kernel_size − 1) / 2`, odd kernels only).
        activation: "none", "relu", "relu6", "leaky_relu", "silu" or "hardswish".
        eps: added to the variance.
        momentum: weight of a new batch in the running statistics; None for their cumulative average.
        negative_slope: the slope of leaky_relu.
        process_group: take batch statistics over all ranks of this group; None for this process alone.
        impl: see `fastcifar.functional.depthwise_conv_bn_act`.

    Raises:
        ValueError: an option that is out of range; the message names it.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int | None = None,
        dilation: int = 1,
        activation: str = "relu",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        impl: str = "auto",
        *,
        negative_slope: float = 0.01,
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        name = type(self).__name__
        if channels < 1 or kernel_size < 1:
            raise ValueError(f"{name}: channels and kernel_size must be ≥ 1, got {channels} and {kernel_size}")
        if padding is None and dilation * (kernel_size - 1) % 2:
            raise ValueError(f"{name}: an even kernel_size ({kernel_size}) needs an explicit padding")
        validation.choose("activation", activation, validation.ACTIVATIONS)
        validation.check_implementation(name, impl)
        self.channels = channels
        self.kernel_size = kernel_size
        self.stride = stride
        self.padding = dilation * (kernel_size - 1) // 2 if padding is None else padding
        self.dilation = dilation
        self.activation = activation
        self.negative_slope = negative_slope
        self.eps = eps
        self.momentum = momentum
        self.process_group = process_group
        self.impl = impl
        factory = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel_size, kernel_size, **factory))
        self.bn_weight = nn.Parameter(torch.empty(channels, **factory))
        self.bn_bias = nn.Parameter(torch.empty(channels, **factory))
        self.register_buffer("running_mean", torch.empty(channels, **factory))
        self.register_buffer("running_var", torch.empty(channels, **factory))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial values as torch gives them to the separate layers."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        nn.init.ones_(self.bn_weight)
        nn.init.zeros_(self.bn_bias)
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.num_batches_tracked.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, channels, H, W] → [N, channels, H', W']."""
        return functional.depthwise_conv_bn_act(
            x,
            self.weight,
            self.bn_weight,
            self.bn_bias,
            self.running_mean,
            self.running_var,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            activation=self.activation,
            negative_slope=self.negative_slope,
            training=self.training,
            momentum=advance_momentum(self),
            eps=self.eps,
            process_group=self.process_group if self.training else None,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        """The options, as `print(model)` shows them."""
        return (
            f"{self.channels}, kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, "
            f"dilation={self.dilation}, activation={self.activation}, eps={self.eps}, momentum={self.momentum}, "
            f"impl={self.impl}"
        )
