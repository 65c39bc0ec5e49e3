"""Batch norm + residual + activation out of four operators, which the compiled module and Triton both have.

Forward reads x twice and the residual once; it saves both and the statistics [2, C]. Backward reads x, the residual
and the gradient, writes dA (the residual's gradient, needed only where there is one), and reads x and dA once more.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from fastcifar.ops.statistics import check_total, mean_terms, merge_over_ranks, update_running

NORM = "Tensor? weight, Tensor? bias, Tensor statistics, float eps, str activation, float negative_slope"


def operator(prefix: str, name: str) -> Any:
    """`torch.ops.fastcifar.{prefix}batch_norm_{name}`."""
    return getattr(torch.ops.fastcifar, f"{prefix}batch_norm_{name}")


def rows_of(tensor: torch.Tensor) -> torch.Tensor:
    """[N, C, …] as dense [N, …, C]: the same memory where the tensor is channels-last."""
    return tensor.movedim(1, -1).contiguous()


def _channels_last(tensor: torch.Tensor) -> torch.Tensor:
    """[N, C, …] whose memory is dense [N, …, C]: the tensor itself, or a copy that all passes then share."""
    return tensor if tensor.movedim(1, -1).is_contiguous() else rows_of(tensor).movedim(-1, 1)


def empty_rows(like: torch.Tensor) -> torch.Tensor:
    """Uninitialised dense [N, …, C] for the results of a call on [N, C, …]."""
    batch, channels, *sizes = like.shape
    return torch.empty((batch, *sizes, channels), dtype=like.dtype, device=like.device)


def define(library: torch.library.Library, prefix: str, wide: torch.dtype) -> None:
    """Defines the four operators and their fake kernels; statistics and sums [2, C] are of dtype `wide`."""
    name = f"{prefix}batch_norm_"
    library.define(f"{name}statistics(Tensor x) -> Tensor")
    library.define(f"{name}normalise(Tensor x, Tensor? residual, {NORM}) -> Tensor")
    library.define(f"{name}reduce(Tensor dz, Tensor x, Tensor? residual, {NORM}) -> (Tensor, Tensor)")
    library.define(f"{name}gradient(Tensor dz, Tensor x, Tensor? terms, {NORM}) -> Tensor")

    @torch.library.register_fake(f"fastcifar::{name}statistics", lib=library)
    def _fake_statistics(x):
        return x.new_empty((2, x.shape[1]), dtype=wide)

    @torch.library.register_fake(f"fastcifar::{name}normalise", lib=library)
    def _fake_normalise(x, *arguments):
        return empty_rows(x).movedim(-1, 1)

    @torch.library.register_fake(f"fastcifar::{name}reduce", lib=library)
    def _fake_reduce(dz, x, residual, *arguments):
        da = x.new_empty(0) if residual is None else empty_rows(x).movedim(-1, 1)
        return x.new_empty((2, x.shape[1]), dtype=wide), da

    @torch.library.register_fake(f"fastcifar::{name}gradient", lib=library)
    def _fake_gradient(dz, x, *arguments):
        return empty_rows(x).movedim(-1, 1)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, statistics, count, act, training, process_group, prefix):
        z = operator(prefix, "normalise")(x, residual, weight, bias, statistics, *act)
        ctx.save_for_backward(x, residual, weight, bias, statistics, count)
        ctx.settings = act, training, process_group, prefix
        # A view made in here could not be changed in place by those who get it.
        return z.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, dz):
        x, residual, weight, bias, statistics, count = ctx.saved_tensors
        dz = _channels_last(dz)
        act, training, process_group, prefix = ctx.settings
        need_dx, need_residual, need_weight, need_bias = ctx.needs_input_grad[:4]
        norm = weight, bias, statistics
        sums = terms = da = None
        if need_weight or need_bias or residual is not None or (training and need_dx):
            sums, da = operator(prefix, "reduce")(dz, x, residual, *norm, *act)
        if training and need_dx:
            terms = mean_terms(sums, x.numel() // max(x.shape[1], 1), count, process_group)
        dx = None
        if need_dx and residual is not None:
            # dA is there already, so nothing of the activation is left to undo.
            dx = operator(prefix, "gradient")(da, x, terms, *norm, act[0], "none", act[2])
        elif need_dx:
            dx = operator(prefix, "gradient")(dz, x, terms, *norm, *act)
        return (
            dx,
            da if need_residual else None,
            sums[1].to(weight.dtype) if need_weight else None,
            sums[0].to(bias.dtype) if need_bias else None,
            *[None] * 6,
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
    prefix: str,
) -> torch.Tensor:
    """The operator out of those whose names begin with `prefix`; shapes as in `fastcifar.functional.batch_norm_act`.

    x, residual: float32, bfloat16 or float16, computed in float32; γ, β and statistics of any floating dtype.
    """
    x, residual = _channels_last(x), None if residual is None else _channels_last(residual)
    act = eps, activation, negative_slope
    group = process_group if training else None
    count = None
    if training:
        values = x.numel() // max(x.shape[1], 1)
        with torch.no_grad():
            own = operator(prefix, "statistics")(x)
            statistics, count = merge_over_ranks(own, values, group)
        check_total(count, values, tuple(x.shape))
        if values or group is not None:
            update_running(running_mean, running_var, statistics, values if count is None else count, momentum)
    else:
        wide = torch.promote_types(running_mean.dtype, torch.float32)
        statistics = torch.stack([running_mean.to(wide), running_var.to(wide)])
    return _Fused.apply(x, residual, weight, bias, statistics, count, act, training, group, prefix)
