"""Forward passes of depthwise convolution + batch norm + activation: statistics (F1, merged by F2) and apply (F3)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import configs
from .activations import activate
from .depthwise_launch import Problem, empty_channels_last, walk_arguments
from .depthwise_rows import (
    begin_rows,
    columns_inside,
    lane_pointers,
    load_vector,
    load_weights,
    locate_lanes,
    locate_program,
    locate_strip,
    next_row,
)
from .statistics import merge_statistics


@triton.jit(do_not_specialize=configs.RUNTIME_INTEGERS)
def depthwise_statistics_kernel(
    x_ptr, weight_ptr, y_ptr, count_ptr, mean_ptr, m2_ptr,
    batch, height, width, out_height, out_width, channels, x_stride_n, x_stride_h, x_stride_w,
    padding_h, padding_w, dilation_h, dilation_w, groups, strips, rows,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, VECTOR: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """F1: convolves a tile and stores its (count, mean, M2) of each channel; y too where `y_ptr` is given."""
    channels = channels * VECTOR
    x_stride_h = x_stride_h * VECTOR
    x_stride_w = x_stride_w * VECTOR
    phases_h = dilation_h * STEP_H // STRIDE_H
    phases_w = dilation_w * STEP_W // STRIDE_W
    tile, strip, block, first_channel = locate_program(channels, strips * phases_h, BLOCK_C, False)
    phase_h, first, count_h = locate_strip(strip, strips, rows, phases_h, out_height)
    image, phase_w, column = locate_lanes(block, groups, phases_w, COLUMNS, BLOCK_P)
    channel = first_channel + tl.arange(0, BLOCK_C)
    channel_ok = channel < channels
    lanes_ok = (image < batch) & channel_ok[None, :]
    out_row = phase_h + phases_h * first
    out_column = phase_w + phases_w * column
    columns_ok = columns_inside(out_column, phases_w, out_width, lanes_ok, COLUMNS)
    y_stride_h = out_width.to(tl.int64) * channels
    if y_ptr is not None:
        y_ptr = lane_pointers(y_ptr, image, out_column, channel, y_stride_h * out_height, channels)
    x_row = STRIDE_H * phase_h - padding_h + dilation_h * STEP_H * first
    x_column = STRIDE_W * phase_w - padding_w + dilation_w * STEP_W * column
    x_ptr = lane_pointers(x_ptr, image, x_column, channel, x_stride_n.to(tl.int64) * VECTOR, x_stride_w)
    x_ok = columns_inside(x_column, dilation_w, width, lanes_ok, STEP_W * (COLUMNS - 1) + KERNEL_W)

    weights = load_weights(weight_ptr, channel, channel_ok, KERNEL_H * KERNEL_W)
    zero = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    pending = begin_rows(
        zero, x_ptr, x_stride_h, x_stride_w * dilation_w, x_row, dilation_h, height, x_ok, weights,
        COLUMNS, KERNEL_H, KERNEL_W, STEP_H, STEP_W,
    )  # fmt: skip
    pivot, sums, squares = zero, zero, zero
    for row in range(0, count_h):
        values, pending = next_row(
            pending, zero, x_ptr, x_stride_h, x_stride_w * dilation_w, x_row + dilation_h * STEP_H * row,
            dilation_h, height, x_ok, weights, COLUMNS, KERNEL_H, KERNEL_W, STEP_H, STEP_W,
        )  # fmt: skip
        # A lane's own first value is within sqrt(n) standard deviations of its mean: sums about it lose nothing.
        pivot = tl.where(row == 0, values[0], pivot)
        for i in tl.static_range(COLUMNS):
            if y_ptr is not None:
                place = (out_row + phases_h * row) * y_stride_h + phases_w * i * channels
                tl.store(y_ptr + place, values[i].to(y_ptr.dtype.element_ty), mask=columns_ok[i])
            distance = tl.where(columns_ok[i], values[i] - pivot, 0.0)
            sums += distance
            squares = tl.fma(distance, distance, squares)

    lane_count = zero
    for i in tl.static_range(COLUMNS):
        lane_count += columns_ok[i].to(tl.float32)
    lane_count *= count_h.to(tl.float32)
    present = lane_count > 0.0
    shift = sums / tl.maximum(lane_count, 1.0)
    lane_mean = tl.where(present, pivot + shift, 0.0)
    count = tl.sum(lane_count, 0)  # [BLOCK_C]
    mean = tl.sum(lane_mean * lane_count, 0) / tl.maximum(count, 1.0)
    distance = lane_mean - mean[None, :]
    m2 = tl.sum(tl.where(present, squares - sums * shift + lane_count * distance * distance, 0.0), 0)
    tl.store(count_ptr + tile, tl.max(count, 0), mask=first_channel == 0)
    partial = tile.to(tl.int64) * channels + channel
    tl.store(mean_ptr + partial, mean, mask=channel_ok)
    tl.store(m2_ptr + partial, m2, mask=channel_ok)


@triton.jit(do_not_specialize=configs.RUNTIME_INTEGERS)
def depthwise_apply_kernel(
    x_ptr, weight_ptr, bn_weight_ptr, bn_bias_ptr, mean_ptr, variance_ptr, z_ptr,
    batch, height, width, out_height, out_width, channels, x_stride_n, x_stride_h, x_stride_w,
    padding_h, padding_w, dilation_h, dilation_w, groups, strips, rows, eps, negative_slope,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, ACTIVATION: tl.constexpr, VECTOR: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """F3: convolves again, normalises, activates and stores z, channels-last. The whole operator in eval mode."""
    channels = channels * VECTOR
    x_stride_h = x_stride_h * VECTOR
    x_stride_w = x_stride_w * VECTOR
    phases_h = dilation_h * STEP_H // STRIDE_H
    phases_w = dilation_w * STEP_W // STRIDE_W
    tile, strip, block, first_channel = locate_program(channels, strips * phases_h, BLOCK_C, True)
    phase_h, first, count_h = locate_strip(strip, strips, rows, phases_h, out_height)
    image, phase_w, column = locate_lanes(block, groups, phases_w, COLUMNS, BLOCK_P)
    channel = first_channel + tl.arange(0, BLOCK_C)
    channel_ok = channel < channels
    lanes_ok = (image < batch) & channel_ok[None, :]
    out_row = phase_h + phases_h * first
    out_column = phase_w + phases_w * column
    columns_ok = columns_inside(out_column, phases_w, out_width, lanes_ok, COLUMNS)
    z_stride_h = out_width.to(tl.int64) * channels
    z_ptr = lane_pointers(z_ptr, image, out_column, channel, z_stride_h * out_height, channels)
    x_row = STRIDE_H * phase_h - padding_h + dilation_h * STEP_H * first
    x_column = STRIDE_W * phase_w - padding_w + dilation_w * STEP_W * column
    x_ptr = lane_pointers(x_ptr, image, x_column, channel, x_stride_n.to(tl.int64) * VECTOR, x_stride_w)
    x_ok = columns_inside(x_column, dilation_w, width, lanes_ok, STEP_W * (COLUMNS - 1) + KERNEL_W)

    weights = load_weights(weight_ptr, channel, channel_ok, KERNEL_H * KERNEL_W)
    scale = tl.rsqrt(load_vector(variance_ptr, channel, channel_ok, 1.0) + eps)
    scale *= load_vector(bn_weight_ptr, channel, channel_ok, 1.0)
    bias = load_vector(bn_bias_ptr, channel, channel_ok, 0.0)
    # Every sum starts from −mean, so that what comes out is centred.
    start = tl.zeros([BLOCK_P, BLOCK_C], tl.float32) - load_vector(mean_ptr, channel, channel_ok, 0.0)
    pending = begin_rows(
        start, x_ptr, x_stride_h, x_stride_w * dilation_w, x_row, dilation_h, height, x_ok, weights,
        COLUMNS, KERNEL_H, KERNEL_W, STEP_H, STEP_W,
    )  # fmt: skip
    for row in range(0, count_h):
        values, pending = next_row(
            pending, start, x_ptr, x_stride_h, x_stride_w * dilation_w, x_row + dilation_h * STEP_H * row,
            dilation_h, height, x_ok, weights, COLUMNS, KERNEL_H, KERNEL_W, STEP_H, STEP_W,
        )  # fmt: skip
        z_row_ptr = z_ptr + (out_row + phases_h * row) * z_stride_h
        for i in tl.static_range(COLUMNS):
            z = activate(tl.fma(values[i], scale, bias), ACTIVATION, negative_slope)
            tl.store(z_row_ptr + phases_w * i * channels, z.to(z_ptr.dtype.element_ty), mask=columns_ok[i])


def convolve(problem: Problem, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The convolution's output y [N, C, H', W'], channels-last in the dtype of x, and what `statistics` gives."""
    y = empty_channels_last((*problem.x.shape[:2], *problem.out_size), problem.x)
    return y, statistics(problem, weight, y)


def statistics(problem: Problem, weight: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
    """Mean and biased variance of each channel of the convolution's output, [2, C], fp32 (F1 and F2).

    `y`, if given, receives the output itself; the statistics are those of the values before they are rounded to it.
    """
    channels, device = problem.x.shape[1], problem.x.device
    walk, arguments = walk_arguments(problem, problem.tile("statistics"))
    count = torch.empty(walk.tiles, dtype=torch.float32, device=device)
    mean, m2 = (torch.empty(walk.tiles, channels, dtype=torch.float32, device=device) for _ in range(2))
    if walk.tiles == 0:
        return torch.zeros(2, channels, dtype=torch.float32, device=device)
    depthwise_statistics_kernel[(walk.programs,)](problem.x, weight, y, count, mean, m2, **arguments)
    return merge_statistics(count, mean, m2)


def apply(
    problem: Problem,
    weight: torch.Tensor,
    bn_weight: torch.Tensor | None,
    bn_bias: torch.Tensor | None,
    mean: torch.Tensor,
    variance: torch.Tensor,
    *,
    eps: float,
    activation: str,
    negative_slope: float,
) -> torch.Tensor:
    """act(γ·(conv(x) − mean)·rstd + β), [N, C, H', W'] channels-last in the dtype of x (F3)."""
    batch, channels = problem.x.shape[:2]
    z = empty_channels_last((batch, channels, *problem.out_size), problem.x)
    walk, arguments = walk_arguments(problem, problem.tile("apply"))
    if walk.tiles:
        depthwise_apply_kernel[(walk.programs,)](
            problem.x, weight, bn_weight, bn_bias, mean, variance, z, **arguments,
            eps=eps, negative_slope=negative_slope, ACTIVATION=activation,
        )  # fmt: skip
    return z
