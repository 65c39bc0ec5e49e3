"""`python -m benchmarks.tune`: times candidate tiles of the Triton depthwise kernels on a GPU.

Prints rows for `TABLE` in kernels/triton/configs.py, the best tile of each pass and shape, and keeps them in
tune-<dtype>.json after every shape. Each candidate's results must equal the default tile's within rounding before it is
timed. Every pass and shape has the same share of the time; what of it is left goes to those that follow.
"""

from __future__ import annotations

import argparse
import itertools
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import reporting

PASSES = ("statistics", "apply", "reduce", "gradients")
SHAPES = [(512, 32, 32), (512, 64, 16), (512, 96, 8), (512, 128, 4), (128, 96, 112), (128, 576, 14)]


def candidates(operation: str, element_size: int) -> list[Any]:
    """Tiles worth trying: 1 or 2 columns, 64 or 128 threads, 32 or 64 channels, strips of 8 to 32 rows.

    Those that differ in rows alone share one compilation, and stand together.
    """
    from fastcifar.kernels.triton.configs import Tile

    vector = 8 // element_size
    columns = (1,) if operation == "gradients" else (2, 1)
    return [
        Tile(count, 32 * warps * vector // block_c, block_c, rows, warps)
        for count, warps, block_c, rows in itertools.product(columns, (4, 2), (64, 32), (32, 16, 8))
        if 32 * warps * vector >= block_c
    ]


def prepare(shape: tuple[int, int, int], dtype: torch.dtype) -> dict[str, Callable[[], torch.Tensor]]:
    """The passes over one shape, by name."""
    from fastcifar.kernels.triton import depthwise_forward
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
    terms = torch.zeros(2, channels, device="cuda")
    return {
        "statistics": lambda: depthwise_forward.statistics(problem, weight),
        "apply": lambda: depthwise_forward.apply(problem, weight, *vectors, **options),
        "reduce": backward.reduce,
        "gradients": lambda: backward.gradients(terms, need_dx=True, need_dw=True)[0],
    }


def best_tile(call: Callable[[], torch.Tensor], tiles: list[Any], until: float) -> dict[str, Any]:
    """The fastest of the default tile, the first of these, and those that a clock that stops at `until` allows."""
    from fastcifar.kernels.triton import configs

    expected, original, results = call(), configs.tile, {}
    for tried, tile in enumerate([None, *tiles]):
        if tried > 1 and time.perf_counter() > until:
            break
        configs.tile = original if tile is None else lambda *arguments, tile=tile: tile
        try:
            if torch.allclose(call().float(), expected.float(), rtol=1e-2, atol=1e-2):
                results[tile] = reporting.interleaved({"call": call}, rounds=15, warmup=3)["call"]
        finally:
            configs.tile = original
    best = min(results, key=results.get)
    return {
        "tile": "default" if best is None else str(tuple(best)),
        "µs": 1e6 * results[best],
        "default, µs": 1e6 * results[None],
        "tried": len(results),
    }


def time_passes(shape: tuple[int, int, int], dtype: torch.dtype, seconds: float) -> list[dict[str, Any]]:
    """The best tile of each pass for one shape, with its time and the default tile's, in microseconds."""
    end, calls, rows = time.perf_counter() + seconds, prepare(shape, dtype), []
    for done, operation in enumerate(PASSES):
        now = time.perf_counter()
        tiles = candidates(operation, torch.finfo(dtype).bits // 8)
        found = best_tile(calls[operation], tiles, now + (end - now) / (len(PASSES) - done))
        rows.append({"pass": operation, "shape": "{}×{}×{}²".format(*shape), **found})
    return rows


def main() -> int:
    """Times, prints, writes; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__)
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16")
    parser.add_argument("--seconds", type=float, default=150.0, help="for all shapes together, about")
    parser.add_argument("--output", type=pathlib.Path, help="folder of the JSON")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("python -m benchmarks.tune: error: torch sees no GPU; tiles can only be timed on one", file=sys.stderr)
        return 2
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[options.dtype]
    end, rows = time.perf_counter() + options.seconds, []
    for done, shape in enumerate(SHAPES):
        left = end - time.perf_counter()
        rows += time_passes(shape, dtype, left / (len(SHAPES) - done))
        path = reporting.save(f"tune-{options.dtype}", {"rows": rows}, options.output)
        print(reporting.table(rows[-len(PASSES) :]), path, sep="\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
