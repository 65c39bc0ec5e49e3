"""Launchers of the backward passes."""

from __future__ import annotations

import torch
import triton

from . import depthwise_backward as kernels
from .depthwise_launch import Problem, Walk, dense_channels_last, empty_channels_last, walk_arguments
from .statistics import sum_partials

# Output pixels that one program of the dw kernel sums: many where there are many, so that programs stay few enough for
# cheap partials, and never so few that the partials outweigh the tensors.
_LEAST_CHUNK, _CHUNK = 256, 4096


class Backward:
    """The backward passes of one call.

    Args:
        problem: the call's x and sizes.
        weight: [C, 1, K, K].
        bn_weight, bn_bias: γ and β, [C], or None.
        mean, variance: [C], fp32, what the forward pass normalised with.
        dz: gradient of the output, [N, C, H', W'], the dtype of x.
        eps, activation, negative_slope: as in the forward pass.
    """

    def __init__(
        self,
        problem: Problem,
        weight: torch.Tensor,
        bn_weight: torch.Tensor | None,
        bn_bias: torch.Tensor | None,
        mean: torch.Tensor,
        variance: torch.Tensor,
        dz: torch.Tensor,
        *,
        eps: float,
        activation: str,
        negative_slope: float,
    ):
        self.problem, self.weight = problem, weight
        self.affine = (bn_weight, bn_bias, mean, variance)
        self.dz = dense_channels_last(dz)
        self.options = {"eps": eps, "negative_slope": negative_slope, "ACTIVATION": activation}

    def _walk_outputs(self, operation: str, terms: torch.Tensor | None, *, store: bool) -> torch.Tensor:
        x = self.problem.x
        walk, arguments = walk_arguments(self.problem, self.problem.tile(operation))
        if store:
            out = empty_channels_last(tuple(self.dz.shape), x)
        else:
            out = torch.empty(walk.tiles, 2, x.shape[1], dtype=torch.float32, device=x.device)
        if walk.tiles:
            kernels.depthwise_reduce_kernel[(walk.programs,)](
                x, self.weight, *self.affine, terms, self.dz, out, **arguments, **self.options, STORE=store
            )
        return out

    def reduce(self) -> torch.Tensor:
        """Σ dA and Σ dA·ŷ over images and pixels, [C, 2], fp32 (B1): the gradients of β and γ."""
        partial = self._walk_outputs("reduce", None, store=False)
        if len(partial) == 0:
            return torch.zeros(partial.shape[2], 2, dtype=torch.float32, device=partial.device)
        return sum_partials(partial)

    def gradients(
        self, terms: torch.Tensor, *, need_dx: bool, need_dw: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """dx in the dtype of x and dw in that of the weight (B2); `terms` are the sums over the count, [C, 2]."""
        problem = self.problem
        if problem.x.numel() == 0:
            dx = torch.empty_like(problem.x) if need_dx else None
            return dx, torch.zeros_like(self.weight) if need_dw else None
        if problem.kernel_size == (3, 3) and problem.stride == (1, 1):
            return self._single_pass(terms, need_dx, need_dw)
        dy = self._walk_outputs("reduce", terms, store=True)
        return self._dx(dy) if need_dx else None, self._dw(dy) if need_dw else None

    def _single_pass(self, terms, need_dx, need_dw):
        problem, tile = self.problem, self.problem.tile("gradients")
        batch, channels, *size = problem.x.shape
        origins = tuple(min(0, d - p) for d, p in zip(problem.dilation, problem.padding, strict=True))
        extents = tuple(
            max(s, o - p + d) - origin
            for s, o, p, d, origin in zip(
                size, problem.out_size, problem.padding, problem.dilation, origins, strict=True
            )
        )
        walk = Walk.over(batch, channels, extents, problem.dilation, tile._replace(columns=1))
        dx = empty_channels_last(tuple(problem.x.shape), problem.x) if need_dx else None
        partial = None
        if need_dw:
            partial = torch.empty(walk.tiles, 9, channels, dtype=torch.float32, device=problem.x.device)
        kernels.depthwise_gradients_kernel[(walk.programs,)](
            problem.x, self.weight, *self.affine, terms, self.dz, dx, partial, **problem.sizes(), **self.options,
            origin_h=origins[0], origin_w=origins[1], groups=walk.groups, strips=walk.strips, rows=tile.rows,
            BLOCK_P=tile.block_p, BLOCK_C=tile.block_c, NEED_DX=need_dx, NEED_DW=need_dw, num_warps=tile.num_warps,
        )  # fmt: skip
        dw = sum_partials(partial, self.weight.dtype).view_as(self.weight) if need_dw else None
        return dx, dw

    def _taps(self) -> dict[str, int]:
        problem = self.problem
        return {
            "STRIDE_H": problem.stride[0],
            "STRIDE_W": problem.stride[1],
            "KERNEL_H": problem.kernel_size[0],
            "KERNEL_W": problem.kernel_size[1],
        }

    def _dx(self, dy: torch.Tensor) -> torch.Tensor:
        problem, tile = self.problem, self.problem.tile("dx")
        batch, channels, height, width = problem.x.shape
        dx = empty_channels_last(tuple(problem.x.shape), problem.x)
        programs = triton.cdiv(batch * height * width, tile.block_p) * triton.cdiv(channels, tile.block_c)
        kernels.depthwise_dx_kernel[(programs,)](
            self.weight, dy, dx, **problem.dense_sizes(), **self._taps(),
            BLOCK_P=tile.block_p, BLOCK_C=tile.block_c, num_warps=tile.num_warps,
        )  # fmt: skip
        return dx

    def _dw(self, dy: torch.Tensor) -> torch.Tensor:
        problem, tile = self.problem, self.problem.tile("dw")
        batch, channels = problem.x.shape[:2]
        pixels = batch * problem.out_size[0] * problem.out_size[1]
        chunk = max(_LEAST_CHUNK, min(_CHUNK, triton.next_power_of_2(triton.cdiv(pixels, 512))))
        parts, taps = triton.cdiv(pixels, chunk), problem.kernel_size[0] * problem.kernel_size[1]
        partial = torch.empty(parts, taps, channels, dtype=torch.float32, device=dy.device)
        programs = parts * triton.cdiv(channels, tile.block_c) * problem.kernel_size[0]
        kernels.depthwise_dw_kernel[(programs,)](
            problem.x, dy, partial, **problem.sizes(), **self._taps(), chunk=chunk,
            BLOCK_P=tile.block_p, BLOCK_C=tile.block_c, num_warps=tile.num_warps,
        )  # fmt: skip
        return sum_partials(partial, self.weight.dtype).view_as(self.weight)
