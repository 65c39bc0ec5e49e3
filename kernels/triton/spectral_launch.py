"""Launchers of the spectral normalisation: which program does what, and what to compile ahead of time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from .cases import Case
from .spectral import (
    spectral_apply_kernel,
    spectral_columns_kernel,
    spectral_gradient_kernel,
    spectral_rows_kernel,
)

ROW_TILE = (16, 256)
COLUMN_TILE = (64, 64)
NORM_BLOCK = 1024
APPLY_BLOCK = 2048
GRADIENT_BLOCK = 8192
WARPS = 4
GRADIENT_WARPS = 16
# A program reads about this many partial sums at most, so that doing it again in every program stays cheap.
PARTIALS = 4096
# Elements of a slice of dW; every slice sums the whole inner product again.
GRADIENT_SLICE = 8192
GRADIENT_SLICES = 16
_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def _parts(length: int, tile: int, other: int) -> tuple[int, int]:
    """Into how many parts, and spans of how many elements, a sum over `length` is cut: `other` sums in all."""
    tiles = triton.cdiv(length, tile)
    parts = min(tiles, max(1, PARTIALS // other))
    span = triton.cdiv(tiles, parts) * tile
    return triton.cdiv(length, span), span


class Batch:
    """The matrices of one call after another: their table and the work items of every launch, on the device.

    `table` holds (rows, outer, inner, swap, weight_offset, vector_offset) of every matrix in a row, offsets multiples
    of 16 elements. Weights and gradients of one dtype (float32, float16, bfloat16), everything else float32.
    """

    def __init__(self, table: tuple[int, ...], device: torch.device):
        fields, rows_items, columns_items, apply_items = [], [], [], []
        self._slices: list[list[tuple[int, int]]] = []
        self._gradient_items: dict[tuple[int, ...], torch.Tensor] = {}
        self._device = device
        workspace = 0
        for layer in range(len(table) // 6):
            rows, outer, inner, swap, weight_offset, vector_offset = table[6 * layer : 6 * layer + 6]
            columns = outer * inner
            size = rows * columns
            if size >= 1 << 30:
                raise ValueError(f"spectral_normalize: a weight must have fewer than 2^30 elements, got {size}")
            t_parts, t_span = _parts(columns, ROW_TILE[1], rows)
            s_parts, s_span = _parts(rows, COLUMN_TILE[0], columns)
            t_offset, s_offset = workspace, workspace + t_parts * rows
            workspace = s_offset + s_parts * columns
            fields.append([rows, outer, inner, swap, weight_offset, vector_offset])
            fields[-1] += [t_offset, t_parts, t_span, s_offset, s_parts, s_span]
            rows_items += [(layer, row, part) for row in range(0, rows, ROW_TILE[0]) for part in range(t_parts)]
            columns_items += [(layer, c, part) for c in range(0, columns, COLUMN_TILE[1]) for part in range(s_parts)]
            step = APPLY_BLOCK * triton.cdiv(2 * max(columns * s_parts, rows * t_parts), APPLY_BLOCK)
            apply_items += [(layer, first, step) for first in range(0, size, step)]
            slices = min(GRADIENT_SLICES, triton.cdiv(size, GRADIENT_SLICE))
            step = GRADIENT_BLOCK * triton.cdiv(triton.cdiv(size, slices), GRADIENT_BLOCK)
            self._slices.append([(first, step) for first in range(0, size, step)])
        self._workspace = workspace
        self._table = torch.tensor(fields, dtype=torch.int64, device=device)
        self._rows, self._columns, self._apply = (
            torch.tensor(items, dtype=torch.int32, device=device) for items in (rows_items, columns_items, apply_items)
        )

    def normalize(
        self, weights, us, vs, new_us, new_vs, normalised, vectors, sigmas, *, n_power_iterations: int, eps: float
    ) -> None:
        """Fills normalised, vectors (u, then v in memory order) and sigmas; with iterations new_us and new_vs too.

        1 + 2·n launches, 2 without iterations. new_us and new_vs may be us and vs themselves.
        """
        held, weights = _addresses(weights)
        _, us = _addresses(us, copy=False)
        _, vs = _addresses(vs, copy=False)
        _, new_us = _addresses(new_us, copy=False)
        _, new_vs = _addresses(new_vs, copy=False)
        workspace = torch.empty(self._workspace, dtype=torch.float32, device=self._device)
        dtype = _DTYPES[normalised.dtype]
        rows, columns = ROW_TILE
        for iteration in range(max(1, n_power_iterations)):
            spectral_rows_kernel[(len(self._rows),)](
                weights, vs, self._table, self._rows, workspace, eps, DTYPE=dtype, FIRST=iteration == 0, ROWS=rows,
                COLUMNS=columns, BLOCK=NORM_BLOCK, num_warps=WARPS,
            )  # fmt: skip
            if n_power_iterations:
                spectral_columns_kernel[(len(self._columns),)](
                    weights, new_us, self._table, self._columns, workspace, vectors, eps, DTYPE=dtype,
                    ROWS=COLUMN_TILE[0], COLUMNS=COLUMN_TILE[1], BLOCK=NORM_BLOCK, num_warps=WARPS,
                )  # fmt: skip
        spectral_apply_kernel[(len(self._apply),)](
            weights, us, vs, new_vs, self._table, self._apply, workspace, normalised, vectors, sigmas, eps, DTYPE=dtype,
            ITERATED=n_power_iterations > 0, NORM_BLOCK=NORM_BLOCK, BLOCK=APPLY_BLOCK, num_warps=WARPS,
        )  # fmt: skip
        del held

    def gradient(self, gradients, normalised, vectors, sigmas, result) -> None:
        """Fills result with dW of every weight whose gradient is not None, in the layout of `normalised`."""
        present = tuple(layer for layer, gradient in enumerate(gradients) if gradient is not None)
        if not present:
            return
        items = self._gradient_items.get(present)
        if items is None:
            rows = [(layer, n, *part) for n, layer in enumerate(present) for part in self._slices[layer]]
            items = self._gradient_items[present] = torch.tensor(rows, dtype=torch.int32, device=self._device)
        held, addresses = _addresses([gradients[layer] for layer in present])
        spectral_gradient_kernel[(len(items),)](
            addresses, self._table, items, normalised, vectors, sigmas, result, DTYPE=_DTYPES[normalised.dtype],
            BLOCK=GRADIENT_BLOCK, num_warps=GRADIENT_WARPS,
        )  # fmt: skip
        del held


def _addresses(tensors, *, copy: bool = True) -> tuple[list[torch.Tensor], tuple[int, ...]]:
    """Addresses as the kernels take them, by value: no copy to the device, and a captured graph holds its own.

    With `copy`, tensors that do not start at a multiple of 16 bytes are copied; the list keeps the copies alive.
    """
    if copy:
        tensors = [t if t.data_ptr() % 16 == 0 else t.clone(memory_format=torch.preserve_format) for t in tensors]
    return tensors, tuple(t.data_ptr() for t in tensors)


def static_cases() -> Iterator[Case]:
    """All kernels in the three dtypes for 7 weights, in float32 for 1 and 40 too."""
    for name, dtype in (("fp32", tl.float32), ("fp16", tl.float16), ("bf16", tl.bfloat16)):
        for layers in (1, 7, 40) if name == "fp32" else (7,):
            lists = dict.fromkeys(("weights", "gradients", "us", "vs", "new_us", "new_vs"), ("i64",) * layers)
            pointers = dict.fromkeys(("workspace_ptr", "vectors_ptr", "sigmas_ptr"), "*fp32")
            pointers |= {"table_ptr": "*i64", "items_ptr": "*i32"}
            pointers |= dict.fromkeys(("normalised_ptr", "result_ptr"), f"*{name}")
            types = {**lists, **pointers, "eps": "fp32"}
            rows = {"ROWS": ROW_TILE[0], "COLUMNS": ROW_TILE[1], "BLOCK": NORM_BLOCK}
            columns = {"ROWS": COLUMN_TILE[0], "COLUMNS": COLUMN_TILE[1], "BLOCK": NORM_BLOCK}
            block = {"NORM_BLOCK": NORM_BLOCK, "BLOCK": APPLY_BLOCK}
            for label, kernel, constants, warps in (
                ("spectral rows first", spectral_rows_kernel, {"FIRST": True, **rows}, WARPS),
                ("spectral rows", spectral_rows_kernel, {"FIRST": False, **rows}, WARPS),
                ("spectral columns", spectral_columns_kernel, columns, WARPS),
                ("spectral apply", spectral_apply_kernel, {"ITERATED": True, **block}, WARPS),
                ("spectral apply frozen", spectral_apply_kernel, {"ITERATED": False, **block}, WARPS),
                ("spectral gradient", spectral_gradient_kernel, {"BLOCK": GRADIENT_BLOCK}, GRADIENT_WARPS),
            ):
                constants = {"DTYPE": dtype, **constants}
                found = {n: types[n] for n in kernel.arg_names if n not in constants}
                aligned = tuple(n for n in found if n.endswith("_ptr"))
                yield Case(f"{label} {name} × {layers}", kernel, found, constants, aligned, warps, False)
