"""Depthwise convolution + batch norm + activation on Triton kernels: operators, fake kernels, autograd.

Forward saves x, the weights and the statistics [2, C]; backward convolves again. Where the convolution's output y is at
most half of x (strides), storing it moves less: then forward saves y too, and the batch norm's own passes do the rest.
The operators are functional: batch statistics are returned, and the caller moves the running ones.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from fastcifar import reference
from fastcifar.ops import batch_norm  # noqa: F401  (registers the operators)
from fastcifar.ops.registration import implement, strided_like
from fastcifar.ops.statistics import check_total, mean_terms, merge_over_ranks, update_running
from fastcifar.validation import output_size

_SIZES = "int[] stride, int[] padding, int[] dilation"
_NORM = "Tensor? bn_weight, Tensor? bn_bias, Tensor statistics"
_ACT = "float eps, str activation, float negative_slope"
_LIBRARY = torch.library.Library("fastcifar", "FRAGMENT")
_LIBRARY.define(f"depthwise_statistics(Tensor x, Tensor weight, {_SIZES}) -> Tensor")
_LIBRARY.define(f"depthwise_convolve(Tensor x, Tensor weight, {_SIZES}) -> (Tensor, Tensor)")
_LIBRARY.define(f"depthwise_apply(Tensor x, Tensor weight, {_NORM}, {_SIZES}, {_ACT}) -> Tensor")
_LIBRARY.define(f"depthwise_reduce(Tensor dz, Tensor x, Tensor weight, {_NORM}, {_SIZES}, {_ACT}) -> Tensor")
_LIBRARY.define(
    f"depthwise_gradients(Tensor dz, Tensor x, Tensor weight, {_NORM}, Tensor terms, {_SIZES}, {_ACT}, bool need_dx, "
    "bool need_dw) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    f"depthwise_convolution_gradients(Tensor dy, Tensor x, Tensor weight, {_SIZES}, bool need_dx, bool need_dw) -> "
    "(Tensor, Tensor)"
)


def _channels_last(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where its channels lie side by side, else a channels-last copy."""
    if tensor.stride(1) == 1 or tensor.shape[1] == 1:
        return tensor
    return tensor.contiguous(memory_format=torch.channels_last)


def _dense(*vectors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """As the kernels read them, which know no strides."""
    return [None if vector is None else vector.contiguous() for vector in vectors]


def _problem(x, weight, stride, padding, dilation):
    from fastcifar.kernels.triton.depthwise_launch import Problem

    return Problem(_channels_last(x), tuple(weight.shape[2:]), tuple(stride), tuple(padding), tuple(dilation))


@implement(_LIBRARY, "depthwise_statistics")
def _statistics(x, weight, stride, padding, dilation):
    from fastcifar.kernels.triton import depthwise_forward

    return depthwise_forward.statistics(_problem(x, weight, stride, padding, dilation), weight.contiguous())


@implement(_LIBRARY, "depthwise_convolve")
def _convolve(x, weight, stride, padding, dilation):
    from fastcifar.kernels.triton import depthwise_forward

    return depthwise_forward.convolve(_problem(x, weight, stride, padding, dilation), weight.contiguous())


@implement(_LIBRARY, "depthwise_apply")
def _apply(x, weight, bn_weight, bn_bias, statistics, stride, padding, dilation, eps, activation, negative_slope):
    from fastcifar.kernels.triton import depthwise_forward

    problem = _problem(x, weight, stride, padding, dilation)
    return depthwise_forward.apply(
        problem, *_dense(weight, bn_weight, bn_bias, statistics[0], statistics[1]),
        eps=eps, activation=activation, negative_slope=negative_slope,
    )  # fmt: skip


def _backward(dz, x, weight, bn_weight, bn_bias, statistics, stride, padding, dilation, eps, activation, slope):
    from fastcifar.kernels.triton.depthwise_gradients import Backward

    return Backward(
        _problem(x, weight, stride, padding, dilation),
        *_dense(weight, bn_weight, bn_bias, statistics[0], statistics[1]),
        dz, eps=eps, activation=activation, negative_slope=slope,
    )  # fmt: skip


@implement(_LIBRARY, "depthwise_reduce")
def _reduce(dz, *arguments):
    return _backward(dz, *arguments).reduce()


@implement(_LIBRARY, "depthwise_gradients")
def _gradients(
    dz, x, weight, bn_weight, bn_bias, statistics, terms, stride, padding, dilation, eps, activation, slope, need_dx,
    need_dw,
):  # fmt: skip
    backward = _backward(
        dz, x, weight, bn_weight, bn_bias, statistics, stride, padding, dilation, eps, activation, slope
    )
    dx, dw = backward.gradients(terms.contiguous(), need_dx=need_dx, need_dw=need_dw)
    return x.new_empty(0) if dx is None else dx, weight.new_empty(0) if dw is None else dw


@implement(_LIBRARY, "depthwise_convolution_gradients")
def _convolution_gradients(dy, x, weight, stride, padding, dilation, need_dx, need_dw):
    from fastcifar.kernels.triton.depthwise_gradients import convolution_gradients

    problem = _problem(x, weight, stride, padding, dilation)
    dx, dw = convolution_gradients(problem, weight.contiguous(), dy, need_dx=need_dx, need_dw=need_dw)
    return x.new_empty(0) if dx is None else dx, weight.new_empty(0) if dw is None else dw


@torch.library.register_fake("fastcifar::depthwise_statistics", lib=_LIBRARY)
def _fake_statistics(x, weight, stride, padding, dilation):
    return x.new_empty((2, x.shape[1]), dtype=torch.float32)


def _like_output(x, weight, stride, padding, dilation):
    size = output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    return x.new_empty((x.shape[0], *size, x.shape[1])).permute(0, 3, 1, 2)


@torch.library.register_fake("fastcifar::depthwise_convolve", lib=_LIBRARY)
def _fake_convolve(x, weight, *sizes):
    return _like_output(x, weight, *sizes), _fake_statistics(x, weight, *sizes)


@torch.library.register_fake("fastcifar::depthwise_apply", lib=_LIBRARY)
def _fake_apply(x, weight, bn_weight, bn_bias, statistics, stride, padding, dilation, eps, activation, negative_slope):
    return _like_output(x, weight, stride, padding, dilation)


@torch.library.register_fake("fastcifar::depthwise_reduce", lib=_LIBRARY)
def _fake_reduce(dz, x, *arguments):
    return x.new_empty((2, x.shape[1]), dtype=torch.float32)


@torch.library.register_fake("fastcifar::depthwise_gradients", lib=_LIBRARY)
@torch.library.register_fake("fastcifar::depthwise_convolution_gradients", lib=_LIBRARY)
def _fake_gradients(dz, x, weight, *arguments):
    need_dx, need_dw = arguments[-2:]
    batch, channels, height, width = x.shape
    dx = x.new_empty((batch, height, width, channels)).permute(0, 3, 1, 2) if need_dx else x.new_empty(0)
    return dx, torch.empty_like(weight, memory_format=torch.contiguous_format) if need_dw else weight.new_empty(0)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bn_weight, bn_bias, statistics, count, sizes, act, training, process_group):
        z = torch.ops.fastcifar.depthwise_apply(x, weight, bn_weight, bn_bias, statistics, *sizes, *act)
        ctx.save_for_backward(x, weight, bn_weight, bn_bias, statistics, count)
        ctx.settings = sizes, act, training, process_group
        # A view made in here could not be changed in place by those who get it.
        return z.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, dz):
        x, weight, bn_weight, bn_bias, statistics, count = ctx.saved_tensors
        sizes, act, training, process_group = ctx.settings
        dz = dz.contiguous(memory_format=torch.channels_last)
        need_dx, need_dw, need_gamma, need_beta = ctx.needs_input_grad[:4]
        arguments = x, weight, bn_weight, bn_bias, statistics
        sums = terms = None
        if need_gamma or need_beta or (training and (need_dx or need_dw)):
            sums = torch.ops.fastcifar.depthwise_reduce(dz, *arguments, *sizes, *act)
        if training and (need_dx or need_dw):
            terms = mean_terms(sums, dz.numel() // max(dz.shape[1], 1), count, process_group)
        elif need_dx or need_dw:
            terms = torch.zeros((2, x.shape[1]), dtype=torch.float32, device=x.device)
        dx = dw = None
        if need_dx or need_dw:
            dx, dw = torch.ops.fastcifar.depthwise_gradients(dz, *arguments, terms, *sizes, *act, need_dx, need_dw)
        return (
            dx if need_dx else None,
            strided_like(dw, weight) if need_dw else None,
            sums[1].to(bn_weight.dtype) if need_gamma else None,
            sums[0].to(bn_bias.dtype) if need_beta else None,
            *[None] * 6,
        )


class _FusedStored(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bn_weight, bn_bias, y, statistics, count, sizes, act, process_group):
        z = torch.ops.fastcifar.batch_norm_normalise(y, None, bn_weight, bn_bias, statistics, *act)
        ctx.save_for_backward(x, weight, bn_weight, bn_bias, y, statistics, count)
        ctx.settings = sizes, act, process_group
        # A view made in here could not be changed in place by those who get it.
        return z.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, dz):
        x, weight, bn_weight, bn_bias, y, statistics, count = ctx.saved_tensors
        sizes, act, process_group = ctx.settings
        dz = dz.contiguous(memory_format=torch.channels_last)
        need_dx, need_dw, need_gamma, need_beta = ctx.needs_input_grad[:4]
        norm = bn_weight, bn_bias, statistics
        sums, _ = torch.ops.fastcifar.batch_norm_reduce(dz, y, None, *norm, *act)
        dx = dw = None
        if need_dx or need_dw:
            terms = mean_terms(sums, dz.numel() // max(dz.shape[1], 1), count, process_group)
            dy = torch.ops.fastcifar.batch_norm_gradient(dz, y, terms, *norm, *act)
            dx, dw = torch.ops.fastcifar.depthwise_convolution_gradients(dy, x, weight, *sizes, need_dx, need_dw)
        return (
            dx if need_dx else None,
            strided_like(dw, weight) if need_dw else None,
            sums[1].to(bn_weight.dtype) if need_gamma else None,
            sums[0].to(bn_bias.dtype) if need_beta else None,
            *[None] * 6,
        )


def depthwise_conv_bn_act(
    x: torch.Tensor,
    weight: torch.Tensor,
    bn_weight: torch.Tensor | None,
    bn_bias: torch.Tensor | None,
    running_mean: torch.Tensor | None = None,
    running_var: torch.Tensor | None = None,
    *,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    activation: str,
    negative_slope: float,
    training: bool,
    momentum: float,
    eps: float,
    process_group: dist.ProcessGroup | None,
) -> torch.Tensor:
    """The operator on Triton kernels; shapes as in `fastcifar.functional.depthwise_conv_bn_act`.

    x, weight: float32, float16 or bfloat16, computed in float32; γ, β and statistics of any floating dtype.
    """
    x = _channels_last(x)
    sizes = list(stride), list(padding), list(dilation)
    act = eps, activation, negative_slope
    group = process_group if training else None
    count = None
    if training and (x.shape[0] or group is not None):
        height, width = output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation)
        values = x.shape[0] * height * width
        y = None
        with torch.no_grad():
            if 2 * height * width <= x.shape[2] * x.shape[3]:
                y, own = torch.ops.fastcifar.depthwise_convolve(x, weight, *sizes)
            else:
                own = torch.ops.fastcifar.depthwise_statistics(x, weight, *sizes)
            statistics, count = merge_over_ranks(own, values, group)
        check_total(count, values, tuple(x.shape))
        update_running(running_mean, running_var, statistics, values if count is None else count, momentum)
        if y is not None:
            return _FusedStored.apply(x, weight, bn_weight, bn_bias, y, statistics, count, sizes, act, group)
    elif training:
        # An empty batch has no statistics; the reference knows what torch makes of it.
        return reference.depthwise_conv_bn_act(
            x, weight, bn_weight, bn_bias, running_mean, running_var, stride=stride, padding=padding,
            dilation=dilation, activation=activation, negative_slope=negative_slope, training=True,
            momentum=momentum, eps=eps,
        )  # fmt: skip
    else:
        statistics = torch.stack([running_mean.float(), running_var.float()])
    return _Fused.apply(x, weight, bn_weight, bn_bias, statistics, count, sizes, act, training, group)
