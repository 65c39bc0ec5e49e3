"""`python -m benchmarks.tune`: times candidate tiles of the Triton depthwise kernels on a GPU.

Prints rows for `TABLE` in kernels/triton/configs.py, the best tile of each pass and shape, and writes tune.json. Each
candidate's results must equal the default tile's within rounding before it is timed.
"""

from __future__ import annotations

import argparse
import itertools
import pathlib
import sys
from typing import Any

import torch

from benchmarks import reporting

PASSES = ("statistics", "apply", "reduce", "gradients")
SHAPES = [(512, 32, 32), (512, 64, 16), (512, 96, 8), (512, 128, 4), (128, 96, 112), (128, 576, 14)]


def candidates(operation: str, element_size: int) -> list[Any]:
    """Tiles worth trying: 1 to 4 columns, 64 to 256 threads, 16 to 128 channels, strips of 8 to 32 rows."""
    from fastcifar.kernels.triton.configs import Tile

    vector = 8 // element_size
    found = []
    for columns, warps, block_c, rows in itertools.product((1, 2, 4), (2, 4, 8), (16, 32, 64, 128), (8, 16, 32)):
        if operation == "gradients" and columns > 1:
            continue
        block_p = 32 * warps * vector // block_c
        if block_p >= 1:
            found.append(Tile(columns, block_p, block_c, rows, warps))
    return found


def time_passes(shape: tuple[int, int, int], dtype: torch.dtype) -> list[dict[str, Any]]:
    """The best tile of each pass for one shape, with its time and the default tile's, in microseconds."""
    from fastcifar.kernels.triton import configs, depthwise_forward
    from fastcifar.kernels.triton.depthwise_gradients import Backward
    from fastcifar.kernels.triton.depthwise_launch import Problem

    batch, channels, size = shape
    x = torch.randn(batch, channels, size, size, device="cuda", dtype=dtype).contiguous(
        memory_format=torch.channels_last
    )
    weight = torch.randn(channels, 1, 3, 3, device="cuda", dtype=dtype)
    vectors = [torch.rand(channels, device="cuda") + 0.5 for _ in range(4)]
    problem = Problem(x, (3, 3), (1, 1), (1, 1), (1, 1))
    options = {"eps": 1e-5, "activation": "relu", "negative_slope": 0.0}
    backward = Backward(problem, weight, *vectors, torch.randn_like(x), **options)
    terms = torch.zeros(channels, 2, device="cuda")
    calls = {
        "statistics": lambda: depthwise_forward.statistics(problem, weight),
        "apply": lambda: depthwise_forward.apply(problem, weight, *vectors, **options),
        "reduce": backward.reduce,
        "gradients": lambda: backward.gradients(terms, need_dx=True, need_dw=True)[0],
    }
    rows = []
    original = configs.tile
    for operation in PASSES:
        expected = calls[operation]()
        results = {}
        for tile in [None, *candidates(operation, x.element_size())]:
            configs.tile = original if tile is None else lambda *arguments, tile=tile: tile
            try:
                got = calls[operation]()
                if torch.allclose(got.float(), expected.float(), rtol=1e-2, atol=1e-2):
                    results[tile] = reporting.interleaved({"call": calls[operation]}, rounds=15, warmup=3)["call"]
            finally:
                configs.tile = original
        best = min(results, key=results.get)
        rows.append(
            {
                "pass": operation,
                "shape": f"{batch}×{channels}×{size}²",
                "tile": "default" if best is None else str(tuple(best)),
                "µs": 1e6 * results[best],
                "default, µs": 1e6 * results[None],
            }
        )
    return rows


def main() -> int:
    """Times, prints, writes; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__)
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16")
    parser.add_argument("--output", type=pathlib.Path, help="folder of the JSON")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("python -m benchmarks.tune: error: torch sees no GPU; tiles can only be timed on one", file=sys.stderr)
        return 2
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[options.dtype]
    rows = [row for shape in SHAPES for row in time_passes(shape, dtype)]
    print(reporting.table(rows))
    print(reporting.save(f"tune-{options.dtype}", {"rows": rows}, options.output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
