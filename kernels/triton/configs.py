"""Tile sizes by architecture, dtype and shape: a table, not a search at run time.

`benchmarks/tune.py` measures candidates on a GPU and prints rows for `TABLE`; what the table lacks gets `default`.
"""

from __future__ import annotations

from typing import NamedTuple

# Integers that change from call to call: kernels are not compiled anew for them.
RUNTIME_INTEGERS = (
    "batch", "height", "width", "out_height", "out_width", "channels", "x_stride_n", "x_stride_h", "x_stride_w",
    "padding_h", "padding_w", "dilation_h", "dilation_w", "groups", "strips", "rows", "origin_h", "origin_w",
    "pixels", "chunk", "stride_h", "stride_w", "parts",
)  # fmt: skip


class Tile(NamedTuple):
    """The work of one program.

    `block_p` lanes along the pixels times `block_c` channels; a lane owns `columns` neighbouring output columns and
    walks down `rows` rows.
    """

    columns: int
    block_p: int
    block_c: int
    rows: int
    num_warps: int


# (pass, compute capability × 10, bytes of an element, kernel size) → [(most channels, most pixels a row, tile), …]
TABLE: dict[tuple[str, int, int, int], list[tuple[int, int, Tile]]] = {}

_MOST = 1 << 30


def vector_width(element_size: int, channels: int) -> int:
    """Elements in a load of 8 bytes, or as many as divide the number of channels."""
    vector = 8 // element_size
    while channels % vector:
        vector //= 2
    return vector


def default(operation: str, element_size: int, kernel_size: int, channels: int, width: int) -> Tile:
    """A tile for any shape: 128 threads, 8-byte loads (4 for 16-bit 7×7), channels that fill whole 64-byte sectors."""
    vector = 8 // element_size
    if kernel_size == 7:
        vector = 2  # 49 weights for each channel of a thread: four channels' would spill
    block_c = 16
    while block_c < min(channels, 16 * vector):
        block_c *= 2
    warps = 4
    block_p = max(1, 32 * warps * vector // block_c)
    columns = 2 if kernel_size == 3 and operation in ("statistics", "apply", "reduce") and width > 2 else 1
    return Tile(columns=columns, block_p=block_p, block_c=block_c, rows=32, num_warps=warps)


def tile(operation: str, capability: int, element_size: int, kernel_size: int, channels: int, width: int) -> Tile:
    """The tile of `TABLE` for this pass ("statistics", "apply", "reduce", "gradients", …), or the default one."""
    for most_channels, most_width, found in TABLE.get((operation, capability, element_size, kernel_size), ()):
        if channels <= most_channels and width <= most_width:
            return found
    return default(operation, element_size, kernel_size, channels, width)
