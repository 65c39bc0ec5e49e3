"""What all depthwise launchers share: layouts, lattice steps, grids."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton

from . import configs
from .device import capability_of


def empty_channels_last(shape: tuple[int, int, int, int], like: torch.Tensor) -> torch.Tensor:
    """[N, C, H, W], uninitialised, dense channels-last, of the dtype and device of `like`."""
    batch, channels, height, width = shape
    storage = torch.empty((batch, height, width, channels), dtype=like.dtype, device=like.device)
    return storage.permute(0, 3, 1, 2)


def dense_channels_last(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with the very strides of `empty_channels_last`."""
    batch, channels, height, width = tensor.shape
    strides = (channels * height * width, 1, channels * width, channels)
    if tensor.stride() == strides:
        return tensor
    return tensor.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


class Problem(NamedTuple):
    """One call: x [N, C, H, W] with its channels side by side, and the convolution's sizes."""

    x: torch.Tensor
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @property
    def out_size(self) -> tuple[int, int]:
        """Height and width of the output."""
        height, width = (
            (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, stride, padding, dilation in zip(
                self.x.shape[2:], self.kernel_size, self.stride, self.padding, self.dilation, strict=True
            )
        )
        return height, width

    @property
    def steps(self) -> tuple[int, int]:
        """Strides in steps of the lattice that the dilation spans."""
        height, width = (s // math.gcd(s, d) for s, d in zip(self.stride, self.dilation, strict=True))
        return height, width

    @property
    def phases(self) -> tuple[int, int]:
        """Independent lattices along height and width."""
        height, width = (d // math.gcd(s, d) for s, d in zip(self.stride, self.dilation, strict=True))
        return height, width

    @property
    def strides(self) -> tuple[int, int, int]:
        """Strides of x over images, rows and columns; a dimension of size 1 counts as dense."""
        _, channels, height, width = self.x.shape
        dense = (channels * height * width, channels * width, channels)
        found = (self.x.stride(0), self.x.stride(2), self.x.stride(3))
        sizes = (self.x.shape[0], height, width)
        return tuple(d if size == 1 else s for s, d, size in zip(found, dense, sizes, strict=True))

    @property
    def vector(self) -> int:
        """Elements of the widest load that every address of this call allows."""
        vector = configs.vector_width(self.x.element_size(), self.x.shape[1])
        return math.gcd(vector, *self.strides)

    def tile(self, operation: str) -> configs.Tile:
        """The tile of this pass."""
        size, channels = self.x.element_size(), self.x.shape[1]
        return configs.tile(operation, capability_of(self.x), size, max(self.kernel_size), channels, self.out_size[1])

    def sizes(self) -> dict[str, Any]:
        """The arguments that all kernels over x take."""
        vector = self.vector
        stride_n, stride_h, stride_w = self.strides
        return {
            **self.dense_sizes(),
            "x_stride_n": stride_n // vector,
            "x_stride_h": stride_h // vector,
            "x_stride_w": stride_w // vector,
            "VECTOR": vector,
        }

    def dense_sizes(self) -> dict[str, Any]:
        """The arguments of kernels that touch dense tensors only."""
        batch, channels, height, width = self.x.shape
        vector = self.vector
        return {
            "batch": batch,
            "height": height,
            "width": width,
            "out_height": self.out_size[0],
            "out_width": self.out_size[1],
            "channels": channels // vector,
            "padding_h": self.padding[0],
            "padding_w": self.padding[1],
            "dilation_h": self.dilation[0],
            "dilation_w": self.dilation[1],
            "VECTOR": vector,
        }


class Walk(NamedTuple):
    """How programs share a plane that is walked row by row."""

    groups: int
    strips: int
    tiles: int
    programs: int

    @classmethod
    def over(
        cls, batch: int, channels: int, size: tuple[int, int], phases: tuple[int, int], tile: configs.Tile
    ) -> Walk:
        """A walk over `batch` planes of this size."""
        groups = triton.cdiv(triton.cdiv(size[1], phases[1]), tile.columns)
        strips = triton.cdiv(triton.cdiv(size[0], phases[0]), tile.rows)
        blocks = triton.cdiv(batch * phases[1] * groups, tile.block_p)
        tiles = blocks * strips * phases[0]
        return cls(groups, strips, tiles, tiles * triton.cdiv(channels, tile.block_c))


def walk_arguments(problem: Problem, tile: configs.Tile) -> tuple[Walk, dict[str, Any]]:
    """The walk over the outputs, and the arguments of a kernel that makes it."""
    walk = Walk.over(problem.x.shape[0], problem.x.shape[1], problem.out_size, problem.phases, tile)
    return walk, {
        **problem.sizes(),
        "groups": walk.groups,
        "strips": walk.strips,
        "rows": tile.rows,
        "STRIDE_H": problem.stride[0],
        "STRIDE_W": problem.stride[1],
        "STEP_H": problem.steps[0],
        "STEP_W": problem.steps[1],
        "KERNEL_H": problem.kernel_size[0],
        "KERNEL_W": problem.kernel_size[1],
        "COLUMNS": tile.columns,
        "BLOCK_P": tile.block_p,
        "BLOCK_C": tile.block_c,
        "num_warps": tile.num_warps,
    }
