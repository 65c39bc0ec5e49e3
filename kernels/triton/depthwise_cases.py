"""Every depthwise kernel with every tile that may run, for ahead-of-time compilation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from . import configs, depthwise_backward, depthwise_forward, statistics

TYPES = {"fp32": 4, "fp16": 2, "bf16": 2}
# Kernel sizes and their strides by dtype: bf16 differs from fp16 in conversions only.
_SIZES = {"fp32": {3: (1, 2), 5: (1, 2), 7: (1, 2)}, "fp16": {3: (1, 2), 5: (1, 2), 7: (1, 2)}, "bf16": {3: (1, 2)}}


class Case(NamedTuple):
    """One compilation.

    `types` names each run-time argument's type, `constants` each compile-time argument's value, `aligned` the
    arguments that are multiples of 16 (bytes, for pointers), `wide` the pointers that must be accessed in pieces of
    at least 8 bytes a thread.
    """

    label: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...]
    num_warps: int
    wide: tuple[str, ...]


_VECTORS = (
    "weight_ptr",
    "bn_weight_ptr",
    "bn_bias_ptr",
    "mean_ptr",
    "variance_ptr",
    "terms_ptr",
    "count_ptr",
    "m2_ptr",
)


def _types(kernel: Any, dtype: str, constants: dict[str, Any]) -> dict[str, str]:
    types = {}
    for name in kernel.arg_names:
        if name in constants:
            continue
        if name in ("eps", "negative_slope"):
            types[name] = "fp32"
        elif not name.endswith("_ptr"):
            types[name] = "i32"
        elif name in _VECTORS or name in ("dw_ptr", "partial_ptr", "result_ptr"):
            types[name] = "*fp32"
        else:
            types[name] = f"*{dtype}"
    return types


def _case(label, kernel, dtype, constants, warps, *, wide=True, **types) -> Case:
    wide = wide and not (constants.get("KERNEL_H") == 7 and TYPES[dtype] == 2)
    found = {**_types(kernel, dtype, constants), **types}
    pointers = tuple(name for name in found if name.endswith("_ptr"))
    tensors = tuple(name for name in ("x_ptr", "z_ptr", "dz_ptr", "dy_ptr", "dx_ptr") if name in found)
    return Case(label, kernel, found, constants, pointers, warps, tensors if wide else ())


def _tiles(operation: str, size: int, kernel_size: int) -> set[configs.Tile]:
    """The default tiles of many channels (of few too, for the common kernel size), and the table's."""
    shapes = [(256, 32), (16, 2)] if kernel_size == 3 else [(256, 32)]
    tiles = {configs.default(operation, size, kernel_size, *shape) for shape in shapes}
    for (name, _, element_size, kernel), rows in configs.TABLE.items():
        if (name, element_size, kernel) == (operation, size, kernel_size):
            tiles |= {tile for _, _, tile in rows}
    return tiles


def _walks(dtype: str) -> Iterator[Case]:
    """F1, F3, B1 and the stored dy, for all kernel sizes and strides."""
    size = TYPES[dtype]
    for kernel_size, strides in _SIZES[dtype].items():
        for stride in strides:
            sizes = {"STRIDE_H": stride, "STRIDE_W": stride, "STEP_H": stride, "STEP_W": stride}
            sizes |= {"KERNEL_H": kernel_size, "KERNEL_W": kernel_size, "VECTOR": 8 // size}
            for operation, kernel in (
                ("statistics", depthwise_forward.depthwise_statistics_kernel),
                ("apply", depthwise_forward.depthwise_apply_kernel),
                ("reduce", depthwise_backward.depthwise_reduce_kernel),
            ):
                for tile in sorted(_tiles(operation, size, kernel_size)):
                    block = {"COLUMNS": tile.columns, "BLOCK_P": tile.block_p, "BLOCK_C": tile.block_c}
                    label = f"{operation} {kernel_size}×{kernel_size} s{stride} {dtype} {tuple(tile)}"
                    constants = {**sizes, **block}
                    if operation == "statistics":
                        yield _case(label, kernel, dtype, constants, tile.num_warps)
                        continue
                    constants["ACTIVATION"] = "silu"
                    if operation == "apply":
                        yield _case(label, kernel, dtype, constants, tile.num_warps)
                        continue
                    constants["STORE"] = False
                    yield _case(label, kernel, dtype, constants, tile.num_warps, out_ptr="*fp32")
                    if stride == 2 or kernel_size > 3:
                        constants = {**constants, "STORE": True}
                        yield _case(label.replace("reduce", "store dy"), kernel, dtype, constants, tile.num_warps)


def _gradients(dtype: str) -> Iterator[Case]:
    size = TYPES[dtype]
    for tile in sorted(_tiles("gradients", size, 3)):
        constants = {"ACTIVATION": "silu", "VECTOR": 8 // size, "BLOCK_P": tile.block_p, "BLOCK_C": tile.block_c}
        constants |= {"NEED_DX": True, "NEED_DW": True}
        label = f"gradients 3×3 s1 {dtype} {tuple(tile)}"
        kernel = depthwise_backward.depthwise_gradients_kernel
        yield _case(label, kernel, dtype, constants, tile.num_warps)
    for kernel_size, strides in _SIZES[dtype].items():
        for stride in strides:
            if kernel_size == 3 and stride == 1:
                continue
            sizes = {"STRIDE_H": stride, "STRIDE_W": stride, "KERNEL_H": kernel_size, "KERNEL_W": kernel_size}
            for operation, kernel in (
                ("dx", depthwise_backward.depthwise_dx_kernel),
                ("dw", depthwise_backward.depthwise_dw_kernel),
            ):
                for tile in sorted(_tiles(operation, size, kernel_size)):
                    constants = {**sizes, "VECTOR": 8 // size, "BLOCK_P": tile.block_p, "BLOCK_C": tile.block_c}
                    label = f"{operation} {kernel_size}×{kernel_size} s{stride} {dtype} {tuple(tile)}"
                    yield _case(label, kernel, dtype, constants, tile.num_warps)


def static_cases() -> Iterator[Case]:
    """All depthwise kernels over kernel sizes, strides, dtypes and tiles."""
    for dtype in TYPES:
        yield from _walks(dtype)
        yield from _gradients(dtype)
    rows = {"ROWS": statistics.MERGE_ROWS, "COLUMNS": statistics.MERGE_COLUMNS}
    warps = statistics.MERGE_WARPS
    yield _case("merge statistics", statistics.merge_statistics_kernel, "fp32", rows, warps, wide=False)
    for taps in (2, 9, 49):
        kernel = statistics.sum_partials_kernel
        yield _case(f"sum partials {taps}", kernel, "fp32", {**rows, "TAPS": taps}, warps, wide=False)
