"""Batch norm + residual + activation on the compiled CPU core."""

from __future__ import annotations

import functools

import torch

from fastcifar import native
from fastcifar.ops import batch_norm_fused
from fastcifar.ops.batch_norm_fused import define, empty_rows, rows_of
from fastcifar.profiling import annotated
from fastcifar.validation import ACTIVATIONS

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_LIBRARY = torch.library.Library("fastcifar", "FRAGMENT")
define(_LIBRARY, "native_", torch.float64)


def _implementation(name: str):
    def register(function):
        _LIBRARY.impl(name, annotated(name)(function), "CPU")
        return function

    return register


def _tensors(x: torch.Tensor, residual: torch.Tensor | None) -> tuple[int, int, int, int, int]:
    channels = x.shape[-1]
    address = 0 if residual is None else residual.data_ptr()
    return x.numel() // max(channels, 1), channels, DTYPES[x.dtype], x.data_ptr(), address


class Norm:
    """γ, β and statistics in the dtypes that the module reads, kept alive while it does."""

    def __init__(self, weight, bias, statistics, eps, activation, negative_slope):
        vectors = (None if vector is None else vector.float().contiguous() for vector in (weight, bias))
        self.tensors = statistics.double().contiguous(), *vectors
        self.options = float(eps), ACTIVATIONS.index(activation), float(negative_slope)

    def numbers(self) -> tuple:
        """What the module's functions take as `norm`."""
        return *(0 if tensor is None else tensor.data_ptr() for tensor in self.tensors), *self.options


@_implementation("native_batch_norm_statistics")
def _statistics(x):
    rows = rows_of(x)
    statistics = torch.empty((2, x.shape[1]), dtype=torch.float64)
    native.module().batch_norm_statistics(_tensors(rows, None), statistics.data_ptr(), torch.get_num_threads())
    return statistics


@_implementation("native_batch_norm_normalise")
def _normalise(x, residual, weight, bias, statistics, eps, activation, negative_slope):
    rows, added = rows_of(x), None if residual is None else rows_of(residual)
    norm, z = Norm(weight, bias, statistics, eps, activation, negative_slope), empty_rows(x)
    native.module().batch_norm_normalise(_tensors(rows, added), norm.numbers(), z.data_ptr(), torch.get_num_threads())
    return z.movedim(-1, 1)


@_implementation("native_batch_norm_reduce")
def _reduce(dz, x, residual, weight, bias, statistics, eps, activation, negative_slope):
    rows, gradient, added = rows_of(x), rows_of(dz), None if residual is None else rows_of(residual)
    norm = Norm(weight, bias, statistics, eps, activation, negative_slope)
    sums = torch.empty((2, x.shape[1]), dtype=torch.float64)
    da = None if residual is None else empty_rows(x)
    native.module().batch_norm_reduce(
        _tensors(rows, added), gradient.data_ptr(), norm.numbers(), 0 if da is None else da.data_ptr(),
        sums.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return sums, x.new_empty(0) if da is None else da.movedim(-1, 1)


@_implementation("native_batch_norm_gradient")
def _gradient(dz, x, terms, weight, bias, statistics, eps, activation, negative_slope):
    rows, gradient = rows_of(x), rows_of(dz)
    norm, dx = Norm(weight, bias, statistics, eps, activation, negative_slope), empty_rows(x)
    terms = None if terms is None else terms.double().contiguous()
    native.module().batch_norm_gradient(
        _tensors(rows, None), gradient.data_ptr(), norm.numbers(), 0 if terms is None else terms.data_ptr(),
        dx.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return dx.movedim(-1, 1)


# x, residual: float32, bfloat16 or float16, computed in float32; γ, β and statistics of any floating dtype.
batch_norm_act = functools.partial(batch_norm_fused.batch_norm_act, prefix="native_")
