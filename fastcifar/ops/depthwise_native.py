"""Depthwise convolution + batch norm + activation on the compiled CPU core: operators, fake kernels, autograd.

Forward saves x, the weights, the convolution's result y in the dtype of x and the statistics [2, C]; backward reads y
instead of convolving again. The operators are functional: statistics are returned, and the caller moves the running
ones.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from fastcifar import native, reference
from fastcifar.ops.batch_norm_native import DTYPES, Norm
from fastcifar.ops.registration import strided_like
from fastcifar.ops.statistics import check_total, mean_terms, merge_over_ranks, update_running
from fastcifar.profiling import annotated
from fastcifar.validation import output_size

_SIZES = "int[] stride, int[] padding, int[] dilation"
_NORM = "Tensor? bn_weight, Tensor? bn_bias, Tensor statistics"
_ACT = "float eps, str activation, float negative_slope"
_LIBRARY = torch.library.Library("fastcifar", "FRAGMENT")
_LIBRARY.define(f"native_depthwise_statistics(Tensor x, Tensor weight, {_SIZES}) -> (Tensor, Tensor)")
_LIBRARY.define(f"native_depthwise_inference(Tensor x, Tensor weight, {_NORM}, {_SIZES}, {_ACT}) -> Tensor")
_LIBRARY.define(
    f"native_depthwise_gradients(Tensor dz, Tensor x, Tensor weight, Tensor y, {_NORM}, Tensor? terms, {_SIZES}, "
    f"{_ACT}, bool need_dx, bool need_dw) -> (Tensor, Tensor)"
)


def _implementation(name: str):
    def register(function):
        _LIBRARY.impl(name, annotated(name)(function), "CPU")
        return function

    return register


def _channels_last(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def _empty(like: torch.Tensor, *size: int) -> torch.Tensor:
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _shape(x, weight, stride, padding, dilation) -> list[int]:
    batch, channels, height, width = x.shape
    kernel = weight.shape[2:]
    out = output_size((height, width), kernel, stride, padding, dilation)
    return [batch, height, width, channels, *out, *kernel, *stride, *padding, *dilation]


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@_implementation("native_depthwise_statistics")
def _statistics(x, weight, stride, padding, dilation):
    x, taps = _channels_last(x), weight.float().contiguous()
    shape = _shape(x, weight, stride, padding, dilation)
    y = _empty(x, shape[0], shape[3], *shape[4:6])
    statistics = torch.empty((2, x.shape[1]), dtype=torch.float64)
    native.module().depthwise_statistics(
        shape, DTYPES[x.dtype], x.data_ptr(), taps.data_ptr(), y.data_ptr(), statistics.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return y, statistics


@_implementation("native_depthwise_inference")
def _inference(x, weight, bn_weight, bn_bias, statistics, stride, padding, dilation, eps, activation, negative_slope):
    x, taps = _channels_last(x), weight.float().contiguous()
    norm = Norm(bn_weight, bn_bias, statistics, eps, activation, negative_slope)
    shape = _shape(x, weight, stride, padding, dilation)
    z = _empty(x, shape[0], shape[3], *shape[4:6])
    native.module().depthwise_inference(
        shape, DTYPES[x.dtype], x.data_ptr(), taps.data_ptr(), norm.numbers(), z.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return z


@_implementation("native_depthwise_gradients")
def _gradients(
    dz, x, weight, y, bn_weight, bn_bias, statistics, terms, stride, padding, dilation, eps, activation,
    negative_slope, need_dx, need_dw,
):  # fmt: skip
    x, y, dz, taps = _channels_last(x), _channels_last(y), _channels_last(dz), weight.float().contiguous()
    norm = Norm(bn_weight, bn_bias, statistics, eps, activation, negative_slope)
    terms = None if terms is None else terms.to(torch.float64).contiguous()
    dx = _empty(x, *x.shape) if need_dx else None
    dw = torch.empty(weight.shape, dtype=torch.float32) if need_dw else None
    native.module().depthwise_gradients(
        _shape(x, weight, stride, padding, dilation), DTYPES[x.dtype], x.data_ptr(), taps.data_ptr(), y.data_ptr(),
        dz.data_ptr(), norm.numbers(), _address(terms), _address(dx), _address(dw), torch.get_num_threads(),
    )  # fmt: skip
    return x.new_empty(0) if dx is None else dx, weight.new_empty(0) if dw is None else dw.to(weight.dtype)


@torch.library.register_fake("fastcifar::native_depthwise_statistics", lib=_LIBRARY)
def _fake_statistics(x, weight, stride, padding, dilation):
    size = output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    return _empty(x, x.shape[0], x.shape[1], *size), x.new_empty((2, x.shape[1]), dtype=torch.float64)


@torch.library.register_fake("fastcifar::native_depthwise_inference", lib=_LIBRARY)
def _fake_inference(
    x, weight, bn_weight, bn_bias, statistics, stride, padding, dilation, eps, activation, negative_slope
):
    return _fake_statistics(x, weight, stride, padding, dilation)[0]


@torch.library.register_fake("fastcifar::native_depthwise_gradients", lib=_LIBRARY)
def _fake_gradients(dz, x, weight, *arguments):
    need_dx, need_dw = arguments[-2:]
    dx = _empty(x, *x.shape) if need_dx else x.new_empty(0)
    return dx, weight.new_empty(weight.shape) if need_dw else weight.new_empty(0)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bn_weight, bn_bias, y, statistics, count, sizes, act, training, process_group):
        z = torch.ops.fastcifar.native_batch_norm_normalise(y, None, bn_weight, bn_bias, statistics, *act)
        ctx.save_for_backward(x, weight, bn_weight, bn_bias, y, statistics, count)
        ctx.settings = sizes, act, training, process_group
        # A view made in here could not be changed in place by those who get it.
        return z.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, dz):
        x, weight, bn_weight, bn_bias, y, statistics, count = ctx.saved_tensors
        sizes, act, training, process_group = ctx.settings
        dz = _channels_last(dz)
        need_dx, need_dw, need_gamma, need_beta = ctx.needs_input_grad[:4]
        norm = bn_weight, bn_bias, statistics
        dx = dw = sums = terms = None
        if need_gamma or need_beta or (training and (need_dx or need_dw)):
            sums, _ = torch.ops.fastcifar.native_batch_norm_reduce(dz, y, None, *norm, *act)
        if training and (need_dx or need_dw):
            terms = mean_terms(sums, y.numel() // max(y.shape[1], 1), count, process_group)
        if need_dx or need_dw:
            dx, dw = torch.ops.fastcifar.native_depthwise_gradients(
                dz, x, weight, y, *norm, terms, *sizes, *act, need_dx, need_dw
            )
        return (
            dx if need_dx else None,
            strided_like(dw, weight) if need_dw else None,
            sums[1].to(bn_weight.dtype) if need_gamma else None,
            sums[0].to(bn_bias.dtype) if need_beta else None,
            *[None] * 7,
        )


def _wants_gradient(*tensors: torch.Tensor | None) -> bool:
    given = [tensor for tensor in tensors if tensor is not None]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        return True
    # A tangent of forward mode does not show in requires_grad; the function with a gradient refuses it clearly.
    return not torch.compiler.is_compiling() and any(forward_ad.unpack_dual(t).tangent is not None for t in given)


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
    """The operator on the compiled CPU core; shapes as in `fastcifar.functional.depthwise_conv_bn_act`.

    x, weight: float32, float16 or bfloat16, computed in float32; γ, β and running statistics of any floating dtype.
    The result is channels-last. Every bit of it is the same for any number of threads.
    """
    sizes = list(stride), list(padding), list(dilation)
    act = eps, activation, negative_slope
    group = process_group if training else None
    if x.numel() == 0 and group is None:
        # Nothing to compute; the reference knows what torch makes of it.
        return reference.depthwise_conv_bn_act(
            x, weight, bn_weight, bn_bias, running_mean, running_var, stride=stride, padding=padding,
            dilation=dilation, activation=activation, negative_slope=negative_slope, training=training,
            momentum=momentum, eps=eps,
        )  # fmt: skip
    x = _channels_last(x)
    count = None
    if not training:
        statistics = torch.stack([running_mean.double(), running_var.double()])
        if not _wants_gradient(x, weight, bn_weight, bn_bias):
            return torch.ops.fastcifar.native_depthwise_inference(
                x, weight, bn_weight, bn_bias, statistics, *sizes, *act
            )
    with torch.no_grad():
        y, own = torch.ops.fastcifar.native_depthwise_statistics(x, weight, *sizes)
        if training:
            values = y.numel() // max(y.shape[1], 1)
            statistics, count = merge_over_ranks(own, values, group)
            check_total(count, values, tuple(x.shape))
            update_running(running_mean, running_var, statistics, values if count is None else count, momentum)
    return _Fused.apply(x, weight, bn_weight, bn_bias, y, statistics, count, sizes, act, training, group)
