"""`python -m benchmarks.passes`: each pass of the CPU core's operators, as a share of the rate of a plain copy.

Bytes are those that the pass must read and write; the rate of a copy of x is measured in the same rounds. Passes that
convolve do arithmetic too, 18 operations a value and more. Writes results/passes-cpu.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import reporting
from benchmarks.operators import BATCH_NORM, DEPTHWISE, batch_norm_subject, depthwise_subject
from fastcifar import native
from fastcifar.ops import batch_norm_native, depthwise_native  # noqa: F401  (register the operators)

_ACT = (1e-5, "relu", 0.01)


def depthwise_passes(
    shape: tuple[int, int, int, int, int],
) -> tuple[str, torch.Tensor, dict[str, tuple[int, Callable]]]:
    """The label, x, and each pass: bytes and call."""
    subject = depthwise_subject(shape, torch.bfloat16, torch.device("cpu"))
    x, weight, gamma, beta = (leaf.detach() for leaf in subject.leaves.values())
    stride, padding = [subject.options["stride"]] * 2, [subject.options["padding"]] * 2
    sizes, operators, dz = (stride, padding, [1, 1]), torch.ops.fastcifar, subject.dz
    y, statistics = operators.native_depthwise_statistics(x, weight, *sizes)
    norm, terms = (gamma, beta, statistics), torch.zeros(2, x.shape[1])
    a, b = (t.numel() * t.element_size() for t in (x, y))
    return (
        subject.label,
        x,
        {
            "x → y": (a + b, lambda: operators.native_depthwise_statistics(x, weight, *sizes)),
            "y → z": (2 * b, lambda: operators.native_batch_norm_normalise(y, None, *norm, *_ACT)),
            "y, dz → sums": (2 * b, lambda: operators.native_batch_norm_reduce(dz, y, None, *norm, *_ACT)),
            "x, y, dz → dx, dw": (
                2 * a + 2 * b,
                lambda: operators.native_depthwise_gradients(dz, x, weight, y, *norm, terms, *sizes, *_ACT, True, True),
            ),
        },
    )


def batch_norm_passes(shape: tuple[int, int, int, bool]) -> tuple[str, torch.Tensor, dict[str, tuple[int, Callable]]]:
    """The label, x, and each pass: bytes and call."""
    subject = batch_norm_subject(shape, torch.bfloat16, torch.device("cpu"))
    leaves = {name: leaf.detach() for name, leaf in subject.leaves.items()}
    x, residual, dz, operators = leaves["x"], leaves.get("residual"), subject.dz, torch.ops.fastcifar
    statistics = operators.native_batch_norm_statistics(x)
    norm, terms = (leaves["weight"], leaves["bias"], statistics), torch.zeros(2, x.shape[1])
    a, with_residual = x.numel() * x.element_size(), residual is not None
    return (
        subject.label,
        x,
        {
            "x → statistics": (a, lambda: operators.native_batch_norm_statistics(x)),
            "x (, r) → z": (
                (2 + with_residual) * a,
                lambda: operators.native_batch_norm_normalise(x, residual, *norm, *_ACT),
            ),
            "x (, r), dz → sums (, dA)": (
                (2 + 2 * with_residual) * a,
                lambda: operators.native_batch_norm_reduce(dz, x, residual, *norm, *_ACT),
            ),
            "x, dA → dx": (3 * a, lambda: operators.native_batch_norm_gradient(dz, x, terms, *norm, *_ACT)),
        },
    )


def measure(label: str, x: torch.Tensor, passes: dict[str, tuple[int, Callable]], rounds: int) -> list[dict[str, Any]]:
    """A row for each pass."""
    target = torch.empty_like(x)
    calls = {name: call for name, (_, call) in passes.items()}
    seconds = reporting.interleaved({**calls, "copy": lambda: target.copy_(x)}, rounds=rounds)
    rate = 2 * x.numel() * x.element_size() / seconds["copy"]
    return [
        {"input": label, "pass": name, "ms": 1e3 * seconds[name], "% of copy rate": 100 * size / seconds[name] / rate}
        for name, (size, _) in passes.items()
    ]


def main() -> None:
    """Measures, prints, writes the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.passes", description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    tuned = native.tune_allocator()
    depthwise = [row for shape in DEPTHWISE for row in measure(*depthwise_passes(shape), rounds)]
    batch_norm = [row for shape in BATCH_NORM for row in measure(*batch_norm_passes(shape), rounds)]
    print(f"{reporting.table(depthwise)}\n\n{reporting.table(batch_norm)}")
    content = {"dtype": "bf16", "allocator_tuned": tuned, "depthwise": depthwise, "batch_norm": batch_norm}
    print(reporting.save("passes-cpu", content))


if __name__ == "__main__":
    main()
