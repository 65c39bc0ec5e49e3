"""Every batch-norm kernel with every tile that may run, for ahead-of-time compilation."""

from __future__ import annotations

from collections.abc import Iterator

from . import batch_norm
from .cases import TYPES, Case, case_of, tiles_of

_KERNELS = {
    "bn_statistics": batch_norm.batch_norm_statistics_kernel,
    "bn_apply": batch_norm.batch_norm_apply_kernel,
    "bn_reduce": batch_norm.batch_norm_reduce_kernel,
    "bn_gradient": batch_norm.batch_norm_gradient_kernel,
}


def static_cases() -> Iterator[Case]:
    """All batch-norm kernels over dtypes and tiles, with and without a residual."""
    for dtype, size in TYPES.items():
        for operation, kernel in _KERNELS.items():
            for tile in sorted(tiles_of(operation, size, 1, [(256, 1 << 16), (16, 1 << 16)])):
                constants = {"VECTOR": 8 // size, "BLOCK_P": tile.block_p, "BLOCK_C": tile.block_c}
                if operation != "bn_statistics":
                    constants["ACTIVATION"] = "silu"
                label = f"{operation} {dtype} {tuple(tile)}"
                if operation not in ("bn_apply", "bn_reduce"):
                    yield case_of(label, kernel, dtype, constants, tile.num_warps)
                    continue
                yield case_of(f"{label} residual", kernel, dtype, constants, tile.num_warps)
                absent = {"residual_ptr": None} if operation == "bn_apply" else {"residual_ptr": None, "da_ptr": None}
                yield case_of(label, kernel, dtype, {**constants, **absent}, tile.num_warps)
