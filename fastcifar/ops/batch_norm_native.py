"""Batch norm + residual + activation on the compiled CPU core: operators, fake kernels, autograd.

Forward reads x twice and the residual once; it saves both and the statistics [2, C]. Backward reads x, the residual
and the gradient, writes dA (the residual's gradient, needed only where there is one), and reads x and dA once more.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from fastcifar import native
from fastcifar.ops.statistics import check_total, merge_over_ranks, update_running
from fastcifar.validation import ACTIVATIONS

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_NORM = "Tensor? weight, Tensor? bias, Tensor statistics, float eps, str activation, float negative_slope"
_LIBRARY = torch.library.Library("fastcifar", "FRAGMENT")
_LIBRARY.define("native_batch_norm_statistics(Tensor x) -> Tensor")
_LIBRARY.define(f"native_batch_norm_normalise(Tensor x, Tensor? residual, {_NORM}) -> Tensor")
_LIBRARY.define(f"native_batch_norm_reduce(Tensor dz, Tensor x, Tensor? residual, {_NORM}) -> (Tensor, Tensor)")
_LIBRARY.define(f"native_batch_norm_gradient(Tensor dz, Tensor x, Tensor? terms, {_NORM}) -> Tensor")


def _implementation(name: str):
    def register(function):
        _LIBRARY.impl(name, function, "CPU")
        return function

    return register


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """[N, C, …] as dense [N, …, C]: the same memory where the tensor is channels-last."""
    return tensor.movedim(1, -1).contiguous()


def _empty_rows(like: torch.Tensor) -> torch.Tensor:
    batch, channels, *sizes = like.shape
    return torch.empty((batch, *sizes, channels), dtype=like.dtype, device=like.device)


def _tensors(x: torch.Tensor, residual: torch.Tensor | None) -> tuple[int, int, int, int, int]:
    channels = x.shape[-1]
    address = 0 if residual is None else residual.data_ptr()
    return x.numel() // max(channels, 1), channels, _DTYPES[x.dtype], x.data_ptr(), address


class _Norm:
    """γ, β and statistics in the dtypes that the module reads, kept alive while it does."""

    def __init__(self, weight, bias, statistics, eps, activation, negative_slope):
        vectors = (None if vector is None else vector.float().contiguous() for vector in (weight, bias))
        self.tensors = statistics.double().contiguous(), *vectors
        self.options = float(eps), ACTIVATIONS.index(activation), float(negative_slope)

    def numbers(self) -> tuple:
        return *(0 if tensor is None else tensor.data_ptr() for tensor in self.tensors), *self.options


@_implementation("native_batch_norm_statistics")
def _statistics(x):
    rows = _rows(x)
    statistics = torch.empty((2, x.shape[1]), dtype=torch.float64)
    native.module().batch_norm_statistics(_tensors(rows, None), statistics.data_ptr(), torch.get_num_threads())
    return statistics


@_implementation("native_batch_norm_normalise")
def _normalise(x, residual, weight, bias, statistics, eps, activation, negative_slope):
    rows, added = _rows(x), None if residual is None else _rows(residual)
    norm, z = _Norm(weight, bias, statistics, eps, activation, negative_slope), _empty_rows(x)
    native.module().batch_norm_normalise(
        _tensors(rows, added), norm.numbers(), z.data_ptr(), torch.get_num_threads()
    )
    return z.movedim(-1, 1)


@_implementation("native_batch_norm_reduce")
def _reduce(dz, x, residual, weight, bias, statistics, eps, activation, negative_slope):
    rows, gradient, added = _rows(x), _rows(dz), None if residual is None else _rows(residual)
    norm = _Norm(weight, bias, statistics, eps, activation, negative_slope)
    sums = torch.empty((2, x.shape[1]), dtype=torch.float64)
    da = None if residual is None else _empty_rows(x)
    native.module().batch_norm_reduce(
        _tensors(rows, added), gradient.data_ptr(), norm.numbers(), 0 if da is None else da.data_ptr(),
        sums.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return sums, x.new_empty(0) if da is None else da.movedim(-1, 1)


@_implementation("native_batch_norm_gradient")
def _gradient(dz, x, terms, weight, bias, statistics, eps, activation, negative_slope):
    rows, gradient = _rows(x), _rows(dz)
    norm, dx = _Norm(weight, bias, statistics, eps, activation, negative_slope), _empty_rows(x)
    terms = None if terms is None else terms.double().contiguous()
    native.module().batch_norm_gradient(
        _tensors(rows, None), gradient.data_ptr(), norm.numbers(), 0 if terms is None else terms.data_ptr(),
        dx.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return dx.movedim(-1, 1)


@torch.library.register_fake("fastcifar::native_batch_norm_statistics", lib=_LIBRARY)
def _fake_statistics(x):
    return x.new_empty((2, x.shape[1]), dtype=torch.float64)


@torch.library.register_fake("fastcifar::native_batch_norm_normalise", lib=_LIBRARY)
def _fake_normalise(x, *arguments):
    return _empty_rows(x).movedim(-1, 1)


@torch.library.register_fake("fastcifar::native_batch_norm_reduce", lib=_LIBRARY)
def _fake_reduce(dz, x, residual, *arguments):
    da = x.new_empty(0) if residual is None else _empty_rows(x).movedim(-1, 1)
    return x.new_empty((2, x.shape[1]), dtype=torch.float64), da


@torch.library.register_fake("fastcifar::native_batch_norm_gradient", lib=_LIBRARY)
def _fake_gradient(dz, x, *arguments):
    return _empty_rows(x).movedim(-1, 1)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, statistics, count, act, training, process_group):
        z = torch.ops.fastcifar.native_batch_norm_normalise(x, residual, weight, bias, statistics, *act)
        ctx.save_for_backward(x, residual, weight, bias, statistics, count)
        ctx.settings = act, training, process_group
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx, dz):
        x, residual, weight, bias, statistics, count = ctx.saved_tensors
        act, training, process_group = ctx.settings
        need_dx, need_residual, need_weight, need_bias = ctx.needs_input_grad[:4]
        operators, norm = torch.ops.fastcifar, (weight, bias, statistics)
        sums = terms = da = None
        if need_weight or need_bias or residual is not None or (training and need_dx):
            sums, da = operators.native_batch_norm_reduce(dz, x, residual, *norm, *act)
        if training and need_dx:
            shared = sums
            if process_group is not None:
                shared = sums.clone()
                dist.all_reduce(shared, group=process_group)
            terms = shared / (max(x.numel() // x.shape[1], 1) if count is None else count)
        dx = None
        if need_dx and residual is not None:
            # dA is there already, so nothing of the activation is left to undo.
            dx = operators.native_batch_norm_gradient(da, x, terms, *norm, act[0], "none", act[2])
        elif need_dx:
            dx = operators.native_batch_norm_gradient(dz, x, terms, *norm, *act)
        return (
            dx,
            da if need_residual else None,
            sums[1].to(weight.dtype) if need_weight else None,
            sums[0].to(bias.dtype) if need_bias else None,
            *[None] * 5,
        )


def batch_norm_act(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor | None = None,
    running_var: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    activation: str,
    negative_slope: float,
    training: bool,
    momentum: float,
    eps: float,
    process_group: dist.ProcessGroup | None,
) -> torch.Tensor:
    """The operator on the compiled module; shapes as in `fastcifar.functional.batch_norm_act`.

    x, residual: float32, bfloat16 or float16, computed in float32; γ, β and statistics of any floating dtype.
    """
    act = eps, activation, negative_slope
    group = process_group if training else None
    count = None
    if training:
        values = x.numel() // max(x.shape[1], 1)
        with torch.no_grad():
            own = torch.ops.fastcifar.native_batch_norm_statistics(x)
            statistics, count = merge_over_ranks(own, values, group)
        check_total(count, tuple(x.shape))
        if values or group is not None:
            update_running(running_mean, running_var, statistics, values if count is None else count, momentum)
    else:
        statistics = torch.stack([running_mean.double(), running_var.double()])
    return _Fused.apply(x, residual, weight, bias, statistics, count, act, training, group)
