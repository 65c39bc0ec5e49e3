"""Where the weights of a batch lie in memory, seen as matrices."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

# Normalised weights start at multiples of this many elements, so that vector loads are aligned.
ALIGNMENT = 16


class Layout(NamedTuple):
    """A batch of dense weights as matrices, and the sizes of what holds their results.

    A weight is a matrix [rows, outer·inner] that lies in memory as [outer, rows, inner]. Column m in memory order is
    column (m % q)·swap + m // q of the matrix, q = columns / swap (swap is 1 unless the weight is channels-last).
    `table` holds (rows, outer, inner, swap, weight_offset, vector_offset) of every weight in a row, the offsets into
    tensors of `normalised` elements (all W/σ) and `vectors` elements (all u and v, v in memory order). `views` are
    (shape, strides, offset) of each normalised weight, `lengths` those of its u and v.
    """

    table: tuple[int, ...]
    normalised: int
    vectors: int
    views: tuple[tuple[tuple[int, ...], tuple[int, ...], int], ...]
    lengths: tuple[tuple[int, int], ...]

    def split_normalised(self, normalised: torch.Tensor) -> list[torch.Tensor]:
        """The weights in a tensor of `normalised` elements, as views."""
        as_strided = normalised.as_strided
        return [as_strided(*view) for view in self.views]

    def split_vectors(self, vectors: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The us and the vs, as views, in a tensor that holds all us, then all vs, without gaps."""
        sizes = [rows for rows, _ in self.lengths] + [columns for _, columns in self.lengths]
        views = vectors.split(sizes)
        return list(views[: len(self.lengths)]), list(views[len(self.lengths) :])

    def advanced(self, like: torch.Tensor) -> torch.Tensor:
        """An empty tensor for `split_vectors`."""
        return like.new_empty(sum([rows + columns for rows, columns in self.lengths]))


@functools.lru_cache(maxsize=1024)
def factor(shape: tuple[int, ...], strides: tuple[int, ...], dim: int) -> tuple[int, int, int, int] | None:
    """(rows, outer, inner, swap) of a weight whose rows lie along `dim`, or None when memory has another order."""
    rest = [axis for axis in range(len(shape)) if axis != dim]
    order = sorted((axis for axis in range(len(shape)) if shape[axis] != 1), key=lambda axis: -strides[axis])
    expected = 1
    for axis in reversed(order):
        if strides[axis] != expected:
            return None
        expected *= shape[axis]
    place = order.index(dim) if shape[dim] != 1 else 0
    columns = [axis for axis in order if axis != dim]
    logical = [axis for axis in rest if shape[axis] != 1]
    # The columns' order in memory may be the matrix's own, or that with its front moved to the back.
    turn = logical.index(columns[0]) if columns else 0
    if columns != logical[turn:] + logical[:turn]:
        return None
    outer = math.prod(shape[axis] for axis in columns[:place])
    inner = math.prod(shape[axis] for axis in columns[place:])
    swap = math.prod(shape[axis] for axis in logical[turn:]) if turn else 1
    return shape[dim], outer, inner, swap


def _place(
    views: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], factors: Sequence[tuple[int, int, int, int]]
) -> Layout:
    matrices, placed, lengths, weight_offset, vector_offset = [], [], [], 0, 0
    for (shape, strides), (rows, outer, inner, swap) in zip(views, factors, strict=True):
        columns = outer * inner
        matrices.append((rows, outer, inner, swap, weight_offset, vector_offset))
        placed.append((shape, strides, weight_offset))
        lengths.append((rows, columns))
        weight_offset = weight_offset + (rows * columns + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
        vector_offset = vector_offset + (rows + columns + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
    table = tuple([number for matrix in matrices for number in matrix])
    return Layout(table, weight_offset, vector_offset, tuple(placed), tuple(lengths))


@functools.lru_cache(maxsize=256)
def _cached_layout(key: tuple[tuple[tuple[int, ...], tuple[int, ...], int], ...]) -> Layout:
    views = [(tuple(shape), strides) for shape, strides, _ in key]
    return _place(views, [factor(*view) for view in key])


def arrange(weights: list[torch.Tensor], dims: list[int]) -> tuple[list[torch.Tensor], Layout]:
    """The weights, copied where their memory has gaps or an unusual order, and their layout."""
    key = [(weight.shape, weight.stride(), dim) for weight, dim in zip(weights, dims, strict=True)]
    for index, (weight, (shape, strides, dim)) in enumerate(zip(weights, key, strict=True)):
        if not weight.is_contiguous() and factor(shape, strides, dim) is None:
            weights = [*weights]
            weights[index] = weight.contiguous()
            key[index] = (shape, weights[index].stride(), dim)
    return weights, _cached_layout(tuple(key))


def arrange_contiguous(weights: list[torch.Tensor]) -> tuple[list[torch.Tensor], Layout]:
    """Contiguous weights (rows first) and their layout by arithmetic alone: compilers can trace it."""
    weights = [weight.contiguous() for weight in weights]
    views = [(weight.shape, weight.stride()) for weight in weights]
    return weights, _place(views, [(weight.shape[0], 1, weight.numel() // weight.shape[0], 1) for weight in weights])


def dense(tensor: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    """The tensor itself when it has these strides, otherwise a copy that has them."""
    if tensor.stride() == strides:
        return tensor
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
