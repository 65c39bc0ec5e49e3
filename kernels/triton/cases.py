"""What a module says of its kernels, so that they can be compiled ahead of time."""

from __future__ import annotations

from typing import Any, NamedTuple

from . import configs

TYPES = {"fp32": 4, "fp16": 2, "bf16": 2}


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
    "statistics_ptr",
)

_TENSORS = ("x_ptr", "y_ptr", "z_ptr", "dz_ptr", "dy_ptr", "dx_ptr", "residual_ptr", "da_ptr")


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


def case_of(
    label: str, kernel: Any, dtype: str, constants: dict[str, Any], warps: int, *, wide: bool = True, **types: str
) -> Case:
    """A case whose arguments' types follow from their names; `dtype` is that of the tensors."""
    found = {**_types(kernel, dtype, constants), **types}
    pointers = tuple(name for name in found if name.endswith("_ptr"))
    tensors = tuple(
        name
        for name in ("x_ptr", "y_ptr", "z_ptr", "dz_ptr", "dy_ptr", "dx_ptr", "residual_ptr", "da_ptr")
        if name in found
    )
    return Case(label, kernel, found, constants, pointers, warps, tensors if wide else ())


def tiles_of(operation: str, element_size: int, kernel_size: int, shapes: list[tuple[int, int]]) -> set[configs.Tile]:
    """The default tiles of these (channels, width), and the table's."""
    tiles = {configs.default(operation, element_size, kernel_size, *shape) for shape in shapes}
    for (name, _, size, kernel), rows in configs.TABLE.items():
        if (name, size, kernel) == (operation, element_size, kernel_size):
            tiles |= {tile for _, _, tile in rows}
    return tiles
