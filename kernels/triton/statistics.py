"""Second stages of the two-stage reductions: partial results of all programs into one, in a fixed order."""

import torch
import triton
import triton.language as tl

MERGE_ROWS = 256
MERGE_COLUMNS = 8
MERGE_WARPS = 8


@triton.jit
def merge_statistics_kernel(
    count_ptr, mean_ptr, m2_ptr, result_ptr, parts, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Chan's merge of `parts` partial (count [parts], mean, M2 [parts, channels]) → result [2, channels], fp32.

    Row 0 of the result is the mean, row 1 the biased variance. The squared distances of the partial means from the
    merged mean are summed in a second sweep: no difference of large numbers is ever taken.
    """
    channel = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    channel_ok = channel < channels
    pivot = tl.load(mean_ptr + channel, mask=channel_ok, other=0.0)  # [COLUMNS]
    total = tl.zeros([ROWS, 1], tl.float32)
    offset = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in tl.range(0, parts, ROWS, loop_unroll_factor=4):
        part = start + tl.arange(0, ROWS)
        ok = (part < parts)[:, None]
        count = tl.load(count_ptr + part, mask=part < parts, other=0.0)[:, None]  # [ROWS, 1]
        place = part.to(tl.int64)[:, None] * channels + channel[None, :]
        mean = tl.load(mean_ptr + place, mask=ok & channel_ok[None, :], other=0.0)
        total += count
        offset += tl.where(count > 0.0, count * (mean - pivot[None, :]), 0.0)
    count = tl.maximum(tl.sum(total, 0), 1.0)  # [1]
    mean = pivot + tl.sum(offset, 0) / count  # [COLUMNS]
    squares = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in tl.range(0, parts, ROWS, loop_unroll_factor=4):
        part = start + tl.arange(0, ROWS)
        ok = (part < parts)[:, None] & channel_ok[None, :]
        index = part.to(tl.int64)[:, None] * channels + channel[None, :]
        part_count = tl.load(count_ptr + part, mask=part < parts, other=0.0)[:, None]
        distance = tl.load(mean_ptr + index, mask=ok, other=0.0) - mean[None, :]
        m2 = tl.load(m2_ptr + index, mask=ok, other=0.0)
        squares += tl.where(part_count > 0.0, tl.fma(part_count * distance, distance, m2), 0.0)
    tl.store(result_ptr + channel, mean, mask=channel_ok)
    tl.store(result_ptr + channels + channel, tl.sum(squares, 0) / count, mask=channel_ok)


@triton.jit
def sum_partials_kernel(
    partial_ptr, result_ptr, parts, channels, TAPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Sums partial [parts, TAPS, channels] over its first axis → result [channels, TAPS], fp32 arithmetic."""
    length = TAPS * channels
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    column_ok = column < length
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in tl.range(0, parts, ROWS, loop_unroll_factor=4):
        part = start + tl.arange(0, ROWS)
        total += tl.load(
            partial_ptr + part.to(tl.int64)[:, None] * length + column[None, :],
            mask=(part < parts)[:, None] & column_ok[None, :],
            other=0.0,
        )
    result = tl.sum(total, 0).to(result_ptr.dtype.element_ty)
    tl.store(result_ptr + column % channels * TAPS + column // channels, result, mask=column_ok)


def merge_statistics(count: torch.Tensor, mean: torch.Tensor, m2: torch.Tensor) -> torch.Tensor:
    """Merges count [P], mean [P, C] and M2 [P, C], fp32, into [2, C]: mean and biased variance.

    Source: Chan, Golub and LeVeque, Updating formulae and a pairwise algorithm for computing sample variances, 1979.
    """
    parts, channels = mean.shape
    result = torch.empty(2, channels, dtype=torch.float32, device=mean.device)
    merge_statistics_kernel[(triton.cdiv(channels, MERGE_COLUMNS),)](
        count, mean, m2, result, parts, channels, ROWS=MERGE_ROWS, COLUMNS=MERGE_COLUMNS, num_warps=MERGE_WARPS
    )
    return result


def sum_partials(partial: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Sums fp32 partial [P, TAPS, C] over P, in a fixed order, into [C, TAPS] of the given dtype."""
    parts, taps, channels = partial.shape
    result = torch.empty(channels, taps, dtype=dtype, device=partial.device)
    sum_partials_kernel[(triton.cdiv(taps * channels, MERGE_COLUMNS),)](
        partial, result, parts, channels, TAPS=taps, ROWS=MERGE_ROWS, COLUMNS=MERGE_COLUMNS, num_warps=MERGE_WARPS
    )
    return result
