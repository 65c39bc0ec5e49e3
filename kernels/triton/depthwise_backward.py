"""Backward passes of depthwise convolution + batch norm + activation.

B1 sums what the batch norm's gradient needs; B2 gives the gradients of input and weights, for 3×3 kernels of stride 1
in a single pass that stores nothing in between, for all others through a stored dy.
"""

import triton
import triton.language as tl

from . import configs
from .activations import activation_gradient
from .depthwise_rows import (
    begin_rows,
    columns_inside,
    lane_pointers,
    load_row,
    load_vector,
    load_weights,
    locate_lanes,
    locate_program,
    locate_strip,
    next_row,
    repeat,
    row_inside,
)


@triton.jit
def normalisation_gradient(
    centred, dz, rstd, gamma, beta, term_sum, term_product, ACTIVATION: tl.constexpr, negative_slope
):
    """dy at a position from y − mean, dz and the two mean terms."""
    normalised = centred * rstd
    da = activation_gradient(dz, tl.fma(normalised, gamma, beta), ACTIVATION, negative_slope)
    return gamma * rstd * (da - term_sum - normalised * term_product)


@triton.jit(do_not_specialize=configs.RUNTIME_INTEGERS)
def depthwise_reduce_kernel(
    x_ptr, weight_ptr, bn_weight_ptr, bn_bias_ptr, mean_ptr, variance_ptr, terms_ptr, dz_ptr, out_ptr,
    batch, height, width, out_height, out_width, channels, x_stride_n, x_stride_h, x_stride_w,
    padding_h, padding_w, dilation_h, dilation_w, groups, strips, rows, eps, negative_slope,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, ACTIVATION: tl.constexpr, VECTOR: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    """B1: convolves again and sums dA and dA·ŷ over a tile, out [tiles, 2, C]. With STORE: writes dy, out like dz."""
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
    z_stride_h = out_width.to(tl.int64) * channels
    dz_ptr = lane_pointers(dz_ptr, image, out_column, channel, z_stride_h * out_height, channels)
    if STORE:
        dy_ptr = lane_pointers(out_ptr, image, out_column, channel, z_stride_h * out_height, channels)
    x_row = STRIDE_H * phase_h - padding_h + dilation_h * STEP_H * first
    x_column = STRIDE_W * phase_w - padding_w + dilation_w * STEP_W * column
    x_ptr = lane_pointers(x_ptr, image, x_column, channel, x_stride_n.to(tl.int64) * VECTOR, x_stride_w)
    x_ok = columns_inside(x_column, dilation_w, width, lanes_ok, STEP_W * (COLUMNS - 1) + KERNEL_W)

    weights = load_weights(weight_ptr, channel, channel_ok, KERNEL_H * KERNEL_W)
    rstd = tl.rsqrt(load_vector(variance_ptr, channel, channel_ok, 1.0) + eps)
    gamma = load_vector(bn_weight_ptr, channel, channel_ok, 1.0)
    beta = load_vector(bn_bias_ptr, channel, channel_ok, 0.0)
    zero = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    start = zero - load_vector(mean_ptr, channel, channel_ok, 0.0)
    if STORE:
        term_sum = load_vector(terms_ptr, channel, channel_ok, 0.0)
        term_product = load_vector(terms_ptr, channels + channel, channel_ok, 0.0)
    pending = begin_rows(
        start, x_ptr, x_stride_h, x_stride_w * dilation_w, x_row, dilation_h, height, x_ok, weights,
        COLUMNS, KERNEL_H, KERNEL_W, STEP_H, STEP_W,
    )  # fmt: skip
    sums, products = zero, zero
    for row in range(0, count_h):
        values, pending = next_row(
            pending, start, x_ptr, x_stride_h, x_stride_w * dilation_w, x_row + dilation_h * STEP_H * row,
            dilation_h, height, x_ok, weights, COLUMNS, KERNEL_H, KERNEL_W, STEP_H, STEP_W,
        )  # fmt: skip
        z_row = (out_row + phases_h * row) * z_stride_h
        for i in tl.static_range(COLUMNS):
            place = z_row + phases_w * i * channels
            dz = tl.load(dz_ptr + place, mask=columns_ok[i], other=0.0).to(tl.float32)
            if STORE:
                dy = normalisation_gradient(
                    values[i], dz, rstd, gamma, beta, term_sum, term_product, ACTIVATION, negative_slope
                )
                tl.store(dy_ptr + place, dy.to(out_ptr.dtype.element_ty), mask=columns_ok[i])
            else:
                normalised = values[i] * rstd
                da = activation_gradient(dz, tl.fma(normalised, gamma, beta), ACTIVATION, negative_slope)
                sums += da
                products += tl.where(columns_ok[i], da * normalised, 0.0)
    if not STORE:
        partial = tile.to(tl.int64) * 2 * channels + channel
        tl.store(out_ptr + partial, tl.sum(sums, 0), mask=channel_ok)
        tl.store(out_ptr + partial + channels, tl.sum(products, 0), mask=channel_ok)


@triton.jit
def add_taps(values, row, weights, FIRST: tl.constexpr):
    """values[j] + Σ_t weights[FIRST + t] · row[j + t] for the three columns j."""
    result = ()
    for j in tl.static_range(3):
        value = values[j]
        for tap in tl.static_range(3):
            value = tl.fma(weights[FIRST + tap], row[j + tap], value)
        result = result + (value,)
    return result


@triton.jit
def add_transposed(value, dy, weights, FIRST: tl.constexpr):
    """value + Σ_t weights[FIRST + t] · dy[2 − t]."""
    for tap in tl.static_range(3):
        value = tl.fma(weights[FIRST + tap], dy[2 - tap], value)
    return value


@triton.jit(do_not_specialize=configs.RUNTIME_INTEGERS)
def depthwise_gradients_kernel(
    x_ptr, weight_ptr, bn_weight_ptr, bn_bias_ptr, mean_ptr, variance_ptr, terms_ptr, dz_ptr, dx_ptr, dw_ptr,
    batch, height, width, out_height, out_width, channels, x_stride_n, x_stride_h, x_stride_w,
    padding_h, padding_w, dilation_h, dilation_w, origin_h, origin_w, groups, strips, rows, eps, negative_slope,
    ACTIVATION: tl.constexpr, VECTOR: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    NEED_DX: tl.constexpr, NEED_DW: tl.constexpr,
):  # fmt: skip
    """B2 for 3×3 kernels of stride 1: dx, channels-last, and partial dw [tiles, 9, C] in one pass over x and dz.

    A lane owns one column of the input and walks down its rows. Each step loads the next row of x at five columns,
    completes y of the row above it at three, turns that into dy, completes dx of the row above that, and adds dy's
    own column to dw. The rows that a strip shares with its neighbours are computed twice and counted once. `origin`
    is where the walk begins: above the image where the padding exceeds the dilation, so that all outputs are met.
    """
    channels = channels * VECTOR
    x_stride_h = x_stride_h * VECTOR
    x_stride_w = x_stride_w * VECTOR
    walk_height = tl.maximum(height, out_height - padding_h + dilation_h) - origin_h
    tile, strip, block, first_channel = locate_program(channels, strips * dilation_h, BLOCK_C, True)
    phase_h, first, count_h = locate_strip(strip, strips, rows, dilation_h, walk_height)
    image, phase_w, column = locate_lanes(block, groups, dilation_w, 1, BLOCK_P)
    channel = first_channel + tl.arange(0, BLOCK_C)
    channel_ok = channel < channels
    lanes_ok = (image < batch) & channel_ok[None, :]
    column = origin_w + phase_w + dilation_w * column  # [BLOCK_P, 1]: the lane's column of x
    row = origin_h + phase_h + dilation_h * first
    out_column = column + padding_w - dilation_w
    out_row = row + padding_h - dilation_h
    x_ok = columns_inside(column - 2 * dilation_w, dilation_w, width, lanes_ok, 5)
    dz_ok = columns_inside(out_column - dilation_w, dilation_w, out_width, lanes_ok, 3)
    x_ptr = lane_pointers(x_ptr, image, column - 2 * dilation_w, channel, x_stride_n.to(tl.int64) * VECTOR, x_stride_w)
    z_stride_h = out_width.to(tl.int64) * channels
    dz_ptr = lane_pointers(dz_ptr, image, out_column - dilation_w, channel, z_stride_h * out_height, channels)
    dx_stride_h = width.to(tl.int64) * channels
    if NEED_DX:
        dx_ptr = lane_pointers(dx_ptr, image, column, channel, dx_stride_h * height, channels)

    weights = load_weights(weight_ptr, channel, channel_ok, 9)
    rstd = tl.rsqrt(load_vector(variance_ptr, channel, channel_ok, 1.0) + eps)
    gamma = load_vector(bn_weight_ptr, channel, channel_ok, 1.0)
    beta = load_vector(bn_bias_ptr, channel, channel_ok, 0.0)
    term_sum = load_vector(terms_ptr, channel, channel_ok, 0.0)
    term_product = load_vector(terms_ptr, channels + channel, channel_ok, 0.0)
    zero = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    start = zero - load_vector(mean_ptr, channel, channel_ok, 0.0)
    next_y, later_y = repeat(start, 3), repeat(start, 3)
    above, middle = repeat(zero, 3), repeat(zero, 3)
    dx, next_dx = zero, zero
    dw = repeat(zero, 9)
    for step in range(-4, count_h):
        x_row = row + dilation_h * (step + 2)
        below = load_row(x_ptr + x_row * x_stride_h, x_stride_w * dilation_w, row_inside(x_row, height), x_ok, 0, 5)
        y = add_taps(next_y, below, weights, 6)
        next_y = add_taps(later_y, below, weights, 3)
        later_y = add_taps(repeat(start, 3), below, weights, 0)
        z_row = out_row + dilation_h * (step + 1)
        row_ok = row_inside(z_row, out_height) & row_inside(step + 2, count_h + 4)
        dz = load_row(dz_ptr + z_row * z_stride_h, dilation_w * channels, row_ok, dz_ok, 0, 3)
        dy = ()
        for j in tl.static_range(3):
            value = normalisation_gradient(
                y[j], dz[j], rstd, gamma, beta, term_sum, term_product, ACTIVATION, negative_slope
            )
            dy = dy + (tl.where(dz_ok[j] & row_ok, value, 0.0),)
        if NEED_DX:
            complete = add_transposed(dx, dy, weights, 0)
            dx = add_transposed(next_dx, dy, weights, 3)
            next_dx = add_transposed(zero, dy, weights, 6)
            dx_row = row + dilation_h * step
            dx_ok = x_ok[2] & row_inside(step, count_h) & row_inside(dx_row, height)
            tl.store(dx_ptr + dx_row * dx_stride_h, complete.to(dx_ptr.dtype.element_ty), mask=dx_ok)
        if NEED_DW:
            own = tl.where(row_inside(step + 1, count_h), dy[1], 0.0)
            added = ()
            for tap in tl.static_range(3):
                added = added + (tl.fma(own, above[tap], dw[tap]),)
            for tap in tl.static_range(3):
                added = added + (tl.fma(own, middle[tap], dw[3 + tap]),)
            for tap in tl.static_range(3):
                added = added + (tl.fma(own, below[1 + tap], dw[6 + tap]),)
            dw = added
            above = middle
            middle = below[1:4]
    if NEED_DW:
        partial = tile.to(tl.int64) * 9 * channels + channel
        for tap in tl.static_range(9):
            tl.store(dw_ptr + partial + tap * channels, tl.sum(dw[tap], 0), mask=channel_ok)


@triton.jit(do_not_specialize=configs.RUNTIME_INTEGERS)
def depthwise_dx_kernel(
    weight_ptr, dy_ptr, dx_ptr,
    batch, height, width, out_height, out_width, channels, padding_h, padding_w, dilation_h, dilation_w,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx of any stride: each input pixel gathers from the outputs that it fed. dy and dx are channels-last."""
    channels = channels * VECTOR
    blocks = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0)
    channel = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_ok = channel < channels
    pixel = (program // blocks).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]  # [BLOCK_P, 1]
    line = pixel // width
    image, row, column = line // height, line % height, pixel % width
    lanes_ok = (pixel < batch.to(tl.int64) * height * width) & channel_ok[None, :]
    dy_ptr = dy_ptr + image * out_height * out_width * channels + channel[None, :]
    dx = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for tap_h in tl.static_range(KERNEL_H):
        y = row + padding_h - dilation_h * tap_h
        row_ok = (y >= 0) & (y % STRIDE_H == 0) & (y // STRIDE_H < out_height)
        for tap_w in tl.static_range(KERNEL_W):
            x = column + padding_w - dilation_w * tap_w
            ok = row_ok & (x >= 0) & (x % STRIDE_W == 0) & (x // STRIDE_W < out_width) & lanes_ok
            place = (y // STRIDE_H * out_width + x // STRIDE_W) * channels
            dy = tl.load(dy_ptr + place, mask=ok, other=0.0).to(tl.float32)
            weight = tl.load(weight_ptr + channel * (KERNEL_H * KERNEL_W) + tap_h * KERNEL_W + tap_w, mask=channel_ok)
            dx = tl.fma(weight.to(tl.float32)[None, :], dy, dx)
    tl.store(dx_ptr + pixel * channels + channel[None, :], dx.to(dx_ptr.dtype.element_ty), mask=lanes_ok)


@triton.jit(do_not_specialize=configs.RUNTIME_INTEGERS)
def depthwise_dw_kernel(
    x_ptr, dy_ptr, dw_ptr,
    batch, height, width, out_height, out_width, channels, x_stride_n, x_stride_h, x_stride_w,
    padding_h, padding_w, dilation_h, dilation_w, chunk,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Partial dw [chunks, KERNEL_H·KERNEL_W, C] of one row of taps over `chunk` output pixels; dy is channels-last."""
    channels = channels * VECTOR
    blocks = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0)
    channel = program // KERNEL_H % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_ok = channel < channels
    tap_h = program % KERNEL_H
    part = (program // KERNEL_H // blocks).to(tl.int64)
    first = part * chunk
    count = tl.minimum(batch.to(tl.int64) * out_height * out_width - first, chunk).to(tl.int32)
    dy_ptr += first * channels
    # The first pixel's row and column by 64-bit division, once. From there on 32 bits do: what is added to them is less
    # than a chunk and a block, so only a row or column of y of nearly 2^31 pixels could wrap.
    first_line = first // out_width
    first_column = (first % out_width).to(tl.int32)
    first_image = first_line // out_height
    first_row = (first_line % out_height).to(tl.int32)
    dw = repeat(tl.zeros([BLOCK_P, BLOCK_C], tl.float32), KERNEL_W)
    for start in range(0, count, BLOCK_P):
        pixel = start + tl.arange(0, BLOCK_P)[:, None]  # [BLOCK_P, 1], within the chunk
        ok = (pixel < count) & channel_ok[None, :]
        dy = tl.load(dy_ptr + pixel.to(tl.int64) * channels + channel[None, :], mask=ok, other=0.0).to(tl.float32)
        line = first_row + (first_column + pixel) // out_width
        row = line % out_height * STRIDE_H - padding_h + dilation_h * tap_h
        column = (first_column + pixel) % out_width * STRIDE_W - padding_w
        row_ok = ok & (row >= 0) & (row < height)
        place = (first_image + line // out_height) * x_stride_n * VECTOR + row.to(tl.int64) * (x_stride_h * VECTOR)
        added = ()
        for tap in tl.static_range(KERNEL_W):
            x_column = column + dilation_w * tap
            x_ok = row_ok & (x_column >= 0) & (x_column < width)
            x_place = place + x_column.to(tl.int64) * (x_stride_w * VECTOR) + channel[None, :]
            x = tl.load(x_ptr + x_place, mask=x_ok, other=0.0)
            added = added + (tl.fma(dy, x.to(tl.float32), dw[tap]),)
        dw = added
    partial = part * (KERNEL_H * KERNEL_W) * channels + channel
    for tap in tl.static_range(KERNEL_W):
        place = partial + (tap_h * KERNEL_W + tap) * channels
        tl.store(dw_ptr + place, tl.sum(dw[tap], 0), mask=channel_ok)
