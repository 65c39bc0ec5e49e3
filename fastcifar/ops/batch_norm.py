"""Batch norm + residual + activation on Triton kernels."""

from __future__ import annotations

import functools

import torch

from fastcifar.ops import batch_norm_fused
from fastcifar.ops.batch_norm_fused import define, rows_of
from fastcifar.ops.registration import implement

_LIBRARY = torch.library.Library("fastcifar", "FRAGMENT")
define(_LIBRARY, "", torch.float32)


def _pixels(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """[N, C, …] as dense [P, C]."""
    return None if tensor is None else rows_of(tensor).flatten(0, -2)


def _dense(vector: torch.Tensor | None) -> torch.Tensor | None:
    """As the kernels read it, which know no strides."""
    return None if vector is None else vector.contiguous()


def _like(pixels: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """[P, C] as [N, C, …] again."""
    batch, channels, *sizes = x.shape
    return pixels.view(batch, *sizes, channels).movedim(-1, 1)


def _passes(x, residual, weight, bias, statistics, eps, activation, negative_slope):
    from fastcifar.kernels.triton.batch_norm import Passes

    return Passes(
        _pixels(x), _pixels(residual), _dense(weight), _dense(bias), statistics.float().contiguous(),
        eps=eps, activation=activation, negative_slope=negative_slope,
    )  # fmt: skip


@implement(_LIBRARY, "batch_norm_statistics")
def _statistics(x):
    from fastcifar.kernels.triton import batch_norm

    return batch_norm.statistics(_pixels(x))


@implement(_LIBRARY, "batch_norm_normalise")
def _normalise(x, residual, *norm):
    return _like(_passes(x, residual, *norm).normalise(), x)


@implement(_LIBRARY, "batch_norm_reduce")
def _reduce(dz, x, residual, *norm):
    sums, da = _passes(x, residual, *norm).reduce(_pixels(dz))
    return sums, x.new_empty(0) if da is None else _like(da, x)


@implement(_LIBRARY, "batch_norm_gradient")
def _gradient(dz, x, terms, *norm):
    return _like(_passes(x, None, *norm).gradient(_pixels(dz), _dense(terms)), x)


# x, residual: float32, float16 or bfloat16, computed in float32; γ, β and statistics of any floating dtype.
batch_norm_act = functools.partial(batch_norm_fused.batch_norm_act, prefix="")
