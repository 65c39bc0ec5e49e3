"""Kernels whose compilation is known: what the static report must praise and what it must find."""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Case(NamedTuple):
    label: str
    kernel: Any
    types: dict
    constants: dict
    aligned: tuple
    num_warps: int = 4
    wide: Any = False


@triton.jit
def copy_kernel(x_ptr, y_ptr, length, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + index, tl.load(x_ptr + index, mask=index < length), mask=index < length)


@triton.jit
def scale_kernel(x_ptr, scale_ptr, y_ptr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Narrow accesses of the tensor x, wide ones of the small vector scale."""
    channel = tl.arange(0, BLOCK_C)
    index = tl.arange(0, BLOCK_P)[:, None] * BLOCK_C + channel
    tl.store(y_ptr + index, (tl.load(x_ptr + index) * tl.load(scale_ptr + channel)).to(y_ptr.dtype.element_ty))


@triton.jit
def hungry_kernel(x_ptr, y_ptr, rounds, BLOCK: tl.constexpr, COUNT: tl.constexpr):
    """Keeps COUNT values alive through a loop: more than the 64 registers of a thread in a block of 32 warps."""
    index = tl.arange(0, BLOCK)
    values = ()
    for k in tl.static_range(COUNT):
        values = values + (tl.load(x_ptr + k * BLOCK + index),)
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(0, rounds):
        for k in tl.static_range(COUNT):
            total = total * values[k] + values[COUNT - 1 - k]
    for k in tl.static_range(COUNT):
        tl.store(y_ptr + k * BLOCK + index, values[k] * total)


COPY = {"x_ptr": "*fp32", "y_ptr": "*fp32", "length": "i32"}
BOTH = ("x_ptr", "y_ptr")


def static_cases():
    yield Case("copy", copy_kernel, COPY, {"BLOCK": 1024}, ("x_ptr", "y_ptr", "length"), wide=BOTH)
    yield Case("copy unaligned", copy_kernel, COPY, {"BLOCK": 1024}, (), wide=BOTH)
    yield Case("copy unaligned, widest", copy_kernel, COPY, {"BLOCK": 1024}, (), wide=True)
    types = {"x_ptr": "*fp16", "scale_ptr": "*fp32", "y_ptr": "*fp16"}
    # Two elements a thread: four bytes of x, eight of the scale.
    sizes = {"BLOCK_P": 16, "BLOCK_C": 16}
    yield Case("scale, widest", scale_kernel, types, sizes, tuple(types), wide=True)
    yield Case("scale", scale_kernel, types, sizes, tuple(types), wide=BOTH)
    hungry = {"x_ptr": "*fp32", "y_ptr": "*fp32", "rounds": "i32"}
    yield Case("hungry", hungry_kernel, hungry, {"BLOCK": 1024, "COUNT": 80}, BOTH, num_warps=32)
    yield Case("misnamed", copy_kernel, {**COPY, "z_ptr": "*fp32"}, {"BLOCK": 1024}, ())
