"""Batch norm + residual + activation over pixels [P, C], dense rows of channels: four passes and their launchers.

A program owns BLOCK_C channels and walks down `chunk` pixels, BLOCK_P at a time. Partial sums follow from the shape
alone and are added in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import configs
from .activations import activate, activation_gradient
from .depthwise_rows import load_vector
from .device import capability_of
from .statistics import merge_statistics, sum_partials

_MOST_PARTS = 1024  # partial sums, so that adding them stays cheap


@triton.jit
def locate_chunk(pixels, channels, chunk, BLOCK_C: tl.constexpr, REVERSED: tl.constexpr):
    """This program's part, its first and last pixel (64-bit), its channels [BLOCK_C] and which of them there are.

    REVERSED as in `depthwise_rows.locate_program`.
    """
    program = tl.program_id(0)
    if REVERSED:
        program = tl.num_programs(0) - 1 - program
    blocks = tl.cdiv(channels, BLOCK_C)
    part = (program // blocks).to(tl.int64)
    first = part * chunk
    channel = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    return part, first, tl.minimum(first + chunk, pixels), channel, channel < channels


@triton.jit
def load_pixels(pointer, place, ok):
    """Values at `place` as fp32, zero where there are none."""
    return tl.load(pointer + place, mask=ok, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=configs.RUNTIME_INTEGERS)
def batch_norm_statistics_kernel(
    x_ptr, count_ptr, mean_ptr, m2_ptr, pixels, channels, chunk,
    VECTOR: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """(count, mean, M2) of each channel over a chunk, [parts] and [parts, C]."""
    channels = channels * VECTOR
    part, first, last, channel, channel_ok = locate_chunk(pixels, channels, chunk, BLOCK_C, False)
    lane = tl.arange(0, BLOCK_P)[:, None]
    # Sums about the mean of the first pixels: next to nothing cancels.
    ok = (first + lane < last) & channel_ok[None, :]
    some = tl.minimum(last - first, BLOCK_P).to(tl.float32)
    pivot = tl.sum(load_pixels(x_ptr, (first + lane) * channels + channel[None, :], ok), 0)[None, :] / some
    sums = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    squares = sums
    for start in range(first, last, BLOCK_P):
        ok = (start + lane < last) & channel_ok[None, :]
        value = load_pixels(x_ptr, (start + lane) * channels + channel[None, :], ok)
        distance = tl.where(ok, value - pivot, 0.0)
        sums += distance
        squares = tl.fma(distance, distance, squares)
    count = (last - first).to(tl.float32)
    total = tl.sum(sums, 0)
    shift = total / count
    tl.store(count_ptr + part, count, mask=tl.min(channel, 0) == 0)
    place = part * channels + channel
    tl.store(mean_ptr + place, tl.sum(pivot, 0) + shift, mask=channel_ok)
    m2 = tl.maximum(tl.sum(squares, 0) - total * shift, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(m2_ptr + place, m2, mask=channel_ok)


@triton.jit(do_not_specialize=configs.RUNTIME_INTEGERS)
def batch_norm_apply_kernel(
    x_ptr, residual_ptr, bn_weight_ptr, bn_bias_ptr, statistics_ptr, z_ptr, pixels, channels, chunk, eps,
    negative_slope, ACTIVATION: tl.constexpr, VECTOR: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """z = act(γ·(x − mean)·rstd + β + residual)."""
    channels = channels * VECTOR
    part, first, last, channel, channel_ok = locate_chunk(pixels, channels, chunk, BLOCK_C, True)
    mean = load_vector(statistics_ptr, channel, channel_ok, 0.0)
    scale = tl.rsqrt(load_vector(statistics_ptr, channels + channel, channel_ok, 1.0) + eps)
    scale *= load_vector(bn_weight_ptr, channel, channel_ok, 1.0)
    bias = load_vector(bn_bias_ptr, channel, channel_ok, 0.0)
    for start in range(first, last, BLOCK_P):
        pixel = start + tl.arange(0, BLOCK_P)[:, None]
        ok = (pixel < last) & channel_ok[None, :]
        place = pixel * channels + channel[None, :]
        value = tl.fma(load_pixels(x_ptr, place, ok) - mean, scale, bias)
        if residual_ptr is not None:
            value += load_pixels(residual_ptr, place, ok)
        tl.store(z_ptr + place, activate(value, ACTIVATION, negative_slope).to(z_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=configs.RUNTIME_INTEGERS)
def batch_norm_reduce_kernel(
    x_ptr, residual_ptr, dz_ptr, bn_weight_ptr, bn_bias_ptr, statistics_ptr, da_ptr, partial_ptr, pixels, channels,
    chunk, eps, negative_slope, ACTIVATION: tl.constexpr, VECTOR: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Partial Σ dA and Σ dA·ŷ, [parts, 2, C], with dA = dz·act′; dA itself where `da_ptr` is given."""
    channels = channels * VECTOR
    part, first, last, channel, channel_ok = locate_chunk(pixels, channels, chunk, BLOCK_C, False)
    mean = load_vector(statistics_ptr, channel, channel_ok, 0.0)
    rstd = tl.rsqrt(load_vector(statistics_ptr, channels + channel, channel_ok, 1.0) + eps)
    scale = rstd * load_vector(bn_weight_ptr, channel, channel_ok, 1.0)
    bias = load_vector(bn_bias_ptr, channel, channel_ok, 0.0)
    sums = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    products = sums
    for start in range(first, last, BLOCK_P):
        pixel = start + tl.arange(0, BLOCK_P)[:, None]
        ok = (pixel < last) & channel_ok[None, :]
        place = pixel * channels + channel[None, :]
        centred = load_pixels(x_ptr, place, ok) - mean
        value = tl.fma(centred, scale, bias)
        if residual_ptr is not None:
            value += load_pixels(residual_ptr, place, ok)
        da = activation_gradient(load_pixels(dz_ptr, place, ok), value, ACTIVATION, negative_slope)
        if da_ptr is not None:
            # The sums are those of what is stored: dx is their difference, and may be small.
            stored = da.to(da_ptr.dtype.element_ty)
            tl.store(da_ptr + place, stored, mask=ok)
            da = stored.to(tl.float32)
        sums += tl.where(ok, da, 0.0)
        products = tl.fma(tl.where(ok, da, 0.0), centred, products)
    place = part * 2 * channels + channel
    tl.store(partial_ptr + place, tl.sum(sums, 0), mask=channel_ok)
    tl.store(partial_ptr + place + channels, tl.sum(products, 0) * tl.sum(rstd, 0), mask=channel_ok)


@triton.jit(do_not_specialize=configs.RUNTIME_INTEGERS)
def batch_norm_gradient_kernel(
    x_ptr, dz_ptr, bn_weight_ptr, bn_bias_ptr, statistics_ptr, terms_ptr, dx_ptr, pixels, channels, chunk, eps,
    negative_slope, ACTIVATION: tl.constexpr, VECTOR: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx = γ·rstd·(dA − terms[0] − ŷ·terms[1]) from x and dz, or from dA and the activation "none"."""
    channels = channels * VECTOR
    part, first, last, channel, channel_ok = locate_chunk(pixels, channels, chunk, BLOCK_C, True)
    mean = load_vector(statistics_ptr, channel, channel_ok, 0.0)
    rstd = tl.rsqrt(load_vector(statistics_ptr, channels + channel, channel_ok, 1.0) + eps)
    scale = rstd * load_vector(bn_weight_ptr, channel, channel_ok, 1.0)
    bias = load_vector(bn_bias_ptr, channel, channel_ok, 0.0)
    offset = scale * load_vector(terms_ptr, channel, channel_ok, 0.0)
    slope = scale * rstd
    if terms_ptr is None:
        slope *= 0.0
    else:
        slope *= load_vector(terms_ptr, channels + channel, channel_ok, 0.0)
    for start in range(first, last, BLOCK_P):
        pixel = start + tl.arange(0, BLOCK_P)[:, None]
        ok = (pixel < last) & channel_ok[None, :]
        place = pixel * channels + channel[None, :]
        centred = load_pixels(x_ptr, place, ok) - mean
        value = tl.fma(centred, scale, bias)
        da = activation_gradient(load_pixels(dz_ptr, place, ok), value, ACTIVATION, negative_slope)
        dx = tl.fma(da, scale, -tl.fma(centred, slope, offset))
        tl.store(dx_ptr + place, dx.to(dx_ptr.dtype.element_ty), mask=ok)


def _tile(operation: str, x: torch.Tensor) -> configs.Tile:
    return configs.tile(operation, capability_of(x), x.element_size(), 1, x.shape[1], x.shape[0])


def _launch(kernel, operation: str, x: torch.Tensor, *tensors, chunk: int | None = None, **constants) -> None:
    """Launches over x [P, C]; a program walks down `chunk` pixels, or as many as the tile says."""
    pixels, channels = x.shape
    tile = _tile(operation, x)
    vector = configs.vector_width(x.element_size(), channels)
    chunk = chunk or tile.rows * tile.block_p
    programs = triton.cdiv(pixels, chunk) * triton.cdiv(channels, tile.block_c)
    kernel[(programs,)](
        x, *tensors, pixels, channels // vector, chunk, **constants,
        VECTOR=vector, BLOCK_P=tile.block_p, BLOCK_C=tile.block_c, num_warps=tile.num_warps,
    )  # fmt: skip


def _parts(operation: str, x: torch.Tensor) -> tuple[int, int]:
    """Pixels in a partial sum over x [P, C], and the number of partial sums."""
    tile = _tile(operation, x)
    chunk = max(tile.rows * tile.block_p, triton.cdiv(x.shape[0], _MOST_PARTS))
    return chunk, triton.cdiv(x.shape[0], chunk)


def statistics(x: torch.Tensor) -> torch.Tensor:
    """Mean and biased variance of each channel of x [P, C], [2, C], fp32."""
    if x.numel() == 0:
        return torch.zeros(2, x.shape[1], dtype=torch.float32, device=x.device)
    chunk, parts = _parts("bn_statistics", x)
    count = torch.empty(parts, dtype=torch.float32, device=x.device)
    mean, m2 = (torch.empty(parts, x.shape[1], dtype=torch.float32, device=x.device) for _ in range(2))
    _launch(batch_norm_statistics_kernel, "bn_statistics", x, count, mean, m2, chunk=chunk)
    return merge_statistics(count, mean, m2)


class Passes:
    """The passes of one call that know the statistics; all tensors [P, C], dense, of one dtype.

    Args:
        x: what is normalised.
        residual: added before the activation, or None.
        weight, bias: γ and β, [C], or None.
        statistics: mean and biased variance, [2, C], fp32.
        eps, activation, negative_slope: as in `fastcifar.functional.batch_norm_act`.
    """

    def __init__(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        statistics: torch.Tensor,
        *,
        eps: float,
        activation: str,
        negative_slope: float,
    ):
        self.x, self.residual = x, residual
        self.affine = (weight, bias, statistics)
        self.options = {"eps": eps, "negative_slope": negative_slope, "ACTIVATION": activation}

    def normalise(self) -> torch.Tensor:
        """z [P, C]."""
        z = torch.empty_like(self.x)
        if z.numel():
            _launch(batch_norm_apply_kernel, "bn_apply", self.x, self.residual, *self.affine, z, **self.options)
        return z

    def reduce(self, dz: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Σ dA and Σ dA·ŷ, [2, C], fp32; with a residual also dA [P, C]."""
        channels = self.x.shape[1]
        if self.x.numel() == 0:
            sums = torch.zeros(2, channels, dtype=torch.float32, device=dz.device)
            return sums, None if self.residual is None else torch.empty_like(dz)
        chunk, parts = _parts("bn_reduce", self.x)
        partial = torch.empty(parts, 1, 2 * channels, dtype=torch.float32, device=dz.device)
        da = None if self.residual is None else torch.empty_like(self.x)
        _launch(
            batch_norm_reduce_kernel, "bn_reduce", self.x, self.residual, dz, *self.affine, da, partial, chunk=chunk,
            **self.options,
        )  # fmt: skip
        return sum_partials(partial).view(2, channels), da

    def gradient(self, dz: torch.Tensor, terms: torch.Tensor | None) -> torch.Tensor:
        """dx [P, C] from dz, without a residual; `terms` are the sums over the count, [2, C], or None for zeros."""
        dx = torch.empty_like(self.x)
        if dx.numel():
            _launch(batch_norm_gradient_kernel, "bn_gradient", self.x, dz, *self.affine, terms, dx, **self.options)
        return dx
