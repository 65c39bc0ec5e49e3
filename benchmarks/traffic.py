"""`python -m benchmarks.traffic`: the bytes that each kernel moves, counted in Triton's interpreter; needs no GPU.

Every operator runs forward and backward on a small input; each launch is a line, in passes over that input (bytes
moved / bytes of x), beside what separate PyTorch operators move. The gate: passes and the memory kept for backward
within the limits of `SUBJECTS`, every byte written at most once a launch, nothing touched outside the arguments.
Prints tables, writes results/traffic.json; exit status 1 where the gate does not hold, 2 where nothing was counted.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks import reporting
from benchmarks.counting import ELSEWHERE, count_traffic, saved_bytes
from fastcifar import dispatch, functional


@dataclasses.dataclass(frozen=True)
class Setup:
    """An operator ready to run: `call()` gives its output; gradients go to `inputs`, of which x is the first, where the
    output has any."""

    call: Callable[[], torch.Tensor]
    inputs: tuple[torch.Tensor, ...]
    eager: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Subject:
    """One operator on one input, with the most passes forward and backward and the most memory kept, as × x.

    `by_address`: its kernels are given addresses instead of tensors, so that their memory belongs to no argument.
    """

    operator: str
    label: str
    build: Callable[[], Setup]
    limits: tuple[float, float, float] | None = None
    by_address: bool = False


def eager_passes(x_bytes: int, y_bytes: int) -> tuple[float, float]:
    """Passes over x that a convolution, a batch norm and an activation make one by one, forward and backward.

    Forward: convolution (x → y), statistics (y →), normalisation (y → ), activation ( → z). Backward: activation
    (dz, z → ), batch norm's sums (two in), its gradient (two in, dy out), dx (dy → dx), dw (x, dy →).
    """
    forward = (x_bytes + y_bytes) + y_bytes + 2 * y_bytes + 2 * y_bytes
    backward = 3 * y_bytes + 2 * y_bytes + 3 * y_bytes + (y_bytes + x_bytes) + (x_bytes + y_bytes)
    return forward / x_bytes, backward / x_bytes


def _depthwise(
    dtype: torch.dtype, shape: tuple[int, int, int, int], kernel_size: int = 3, stride: int = 1
) -> Callable[[], Setup]:
    def build() -> Setup:
        generator = torch.Generator().manual_seed(0)
        channels = shape[1]
        x = torch.randn(shape, generator=generator).to(dtype, memory_format=torch.channels_last)
        weight = torch.randn(channels, 1, kernel_size, kernel_size, generator=generator).to(dtype)
        gamma, beta = torch.rand(2, channels, generator=generator) + 0.5
        running_mean, running_var = torch.zeros(channels), torch.ones(channels)
        inputs = tuple(tensor.detach().clone().requires_grad_() for tensor in (x, weight, gamma, beta))

        def call() -> torch.Tensor:
            return functional.depthwise_conv_bn_act(
                *inputs, running_mean, running_var, stride=stride, padding=kernel_size // 2, activation="relu",
                training=True, impl="triton",
            )  # fmt: skip

        out = [(side - 1) // stride + 1 for side in shape[2:]]
        y_bytes = shape[0] * channels * out[0] * out[1] * x.element_size()
        return Setup(call, inputs, eager_passes(x.numel() * x.element_size(), y_bytes))

    return build


def _batch_norm(dtype: torch.dtype, shape: tuple[int, int, int, int], *, with_residual: bool) -> Callable[[], Setup]:
    def build() -> Setup:
        generator = torch.Generator().manual_seed(0)

        def normal() -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(dtype, memory_format=torch.channels_last)

        gamma, beta = torch.rand(2, shape[1], generator=generator) + 0.5
        running_mean, running_var = torch.zeros(shape[1]), torch.ones(shape[1])
        tensors = (normal(), gamma, beta, *([normal()] if with_residual else []))
        inputs = tuple(tensor.detach().clone().requires_grad_() for tensor in tensors)

        def call() -> torch.Tensor:
            return functional.batch_norm_act(
                *inputs[:3], running_mean, running_var, *inputs[3:], activation="relu", training=True, impl="triton"
            )

        # Statistics, normalisation, (addition,) activation; activation, the batch norm's sums, its gradient.
        return Setup(call, inputs, (8.0 if with_residual else 5.0, 8.0))

    return build


def _spectral(shape: tuple[int, ...]) -> Callable[[], Setup]:
    def build() -> Setup:
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(shape, generator=generator).requires_grad_()
        u, v = (torch.randn(size, generator=generator) for size in weight.flatten(1).shape)

        def call() -> torch.Tensor:
            return functional.spectral_normalize([weight], [u], [v], impl="triton")[0][0]

        # W v, Wᵀu, W v again, W/σ; dW̄/σ, −dW̄·(W/σ)/σ summed (five operators), u vᵀ, the sum of both.
        return Setup(call, (weight,), (5.0, 16.0))

    return build


def _augment(dtype: torch.dtype, **options: Any) -> Callable[[], Setup]:
    def build() -> Setup:
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (8, 32, 32, 3), generator=generator, dtype=torch.uint8)
        indices = torch.randperm(8, generator=generator)[:4]

        def run(impl: str) -> torch.Tensor:
            return functional.augment(
                images, indices, step=0, seed=0, mean=(0.5,) * 3, std=(0.25,) * 3, dtype=dtype, impl=impl, **options
            )[0]

        x = images[indices]
        run("reference")
        with count_traffic() as separate:
            run("reference")
        return Setup(lambda: run("triton"), (x,), (separate.passes(x), 0.0))

    return build


_LIMITS = (3.2, 5.3, 1.05)
_PIXELS = (3.02, 0.0, 0.0)  # bytes are read, numbers of twice their size are written
_STRIDED = (2.0, 4.2, 1.3)  # the output, a quarter of x, is stored
_SMALL = (4, 32, 16, 16)
SUBJECTS = [
    Subject("depthwise_conv_bn_act", "3×3 s1 4×32×16×16 fp32", _depthwise(torch.float32, _SMALL), _LIMITS),
    Subject("depthwise_conv_bn_act", "3×3 s1 4×32×16×16 fp16", _depthwise(torch.float16, _SMALL), _LIMITS),
    Subject("depthwise_conv_bn_act", "3×3 s1 1×32×32×32 fp16", _depthwise(torch.float16, (1, 32, 32, 32)), _LIMITS),
    Subject("depthwise_conv_bn_act", "3×3 s2 4×32×16×16 fp16", _depthwise(torch.float16, _SMALL, stride=2), _STRIDED),
    Subject("depthwise_conv_bn_act", "5×5 s1 4×32×16×16 fp16", _depthwise(torch.float16, _SMALL, 5)),
    Subject("batch_norm_act", "4×32×16×16 fp16", _batch_norm(torch.float16, _SMALL, with_residual=False), _LIMITS),
    Subject(
        "batch_norm_act",
        "4×32×16×16 fp16 + residual",
        _batch_norm(torch.float16, _SMALL, with_residual=True),
        (4.2, 7.3, 2.05),
    ),
    Subject("spectral_normalize", "128×576 fp32", _spectral((128, 64, 3, 3)), (4.1, 3.1, 1.05), by_address=True),
    Subject("augment", "4×32² fp16 crop, flip", _augment(torch.float16, crop_pad=4, random_flip=True), _PIXELS),
    Subject("augment", "4×32² fp16 jitter, cutout", _augment(torch.float16, color_jitter=0.1, cutout=8), _PIXELS),
    Subject("augment", "4×32² fp16 mixup", _augment(torch.float16, mixup=1.0), _PIXELS),
    Subject("augment", "4×32² fp16 cutmix", _augment(torch.float16, cutmix=1.0), _PIXELS),
]


def missing(subject: Subject) -> str | None:
    """None where the operator's Triton kernels run in the interpreter; otherwise why not."""
    call = dispatch.Call(device=torch.device("cpu"), dtype=torch.float32, kernel_size=(3, 3))
    if subject.operator not in dispatch.operators():
        return f"there is no operator {subject.operator}"
    for implementation in dispatch.implementations(subject.operator):
        if implementation.name == "triton":
            return implementation.obstacle(call)
    return f"{subject.operator} has no Triton implementation"


def measure(subject: Subject) -> dict[str, Any]:
    """Runs a subject forward and backward.

    Returns:
        "operator" and "label"; "forward", "backward" (None without gradient) and "saved" as multiples of x;
        "eager_forward" and "eager_backward"; "limits"; "rows": each launch and PyTorch operator with its bytes.
    """
    setup = subject.build()
    x = setup.inputs[0]
    with count_traffic() as forward:
        parameters = [tensor for tensor in setup.inputs if tensor.shape != x.shape]
        output, saved = saved_bytes(setup.call, parameters=parameters)
    gradient = torch.ones_like(output)
    with count_traffic() as backward:
        if output.requires_grad:
            torch.autograd.grad(output, setup.inputs, gradient)
    rows = [
        {"pass": name, **dataclasses.asdict(row)}
        for name, traffic in (("forward", forward), ("backward", backward))
        for row in traffic.rows
    ]
    return {
        "operator": subject.operator,
        "label": subject.label,
        "x_bytes": x.numel() * x.element_size(),
        "forward": forward.passes(x),
        "backward": backward.passes(x) if output.requires_grad else None,
        "saved": saved / (x.numel() * x.element_size()),
        "eager_forward": setup.eager[0],
        "eager_backward": setup.eager[1],
        "limits": subject.limits,
        "by_address": subject.by_address,
        "rows": rows,
    }


def failures(results: Sequence[dict[str, Any]]) -> list[str]:
    """What exceeds a limit, or cannot be right, a line each."""
    lines = []
    for result in results:
        name = f"{result['operator']} {result['label']}"
        parts = [part for part in ("forward", "backward") if result.get(part, 0.0) is not None]
        for part in parts:
            if not any(row["kind"] == "triton" and row["pass"] == part for row in result["rows"]):
                lines.append(f"{name}: no Triton launch was seen in {part}")
        for part, limit in zip(("forward", "backward", "saved"), result["limits"] or (), strict=False):
            if result[part] is not None and result[part] > limit:
                lines.append(f"{name}: {part} is {result[part]:.3f} × x, at most {limit} are allowed")
        for row in result["rows"]:
            if row["kind"] == "triton" and row["requested_written"] > row["written"]:
                lines.append(f"{name}: {row['name']} writes some bytes more than once, so programs may race")
            if ELSEWHERE in row["arguments"] and not result["by_address"]:
                lines.append(f"{name}: {row['name']} touches memory outside its arguments")
    return lines


def notes(results: Sequence[dict[str, Any]]) -> list[str]:
    """Where the fused operator moves more than separate ones do, a line each."""
    return [
        f"{r['operator']} {r['label']}: {part} moves {r[part]:.1f} × x, separate operators {r['eager_' + part]:.1f}"
        for r in results
        for part in ("forward", "backward")
        if r[part] is not None and r[part] > r["eager_" + part]
    ]


def launch_table(result: dict[str, Any]) -> list[dict[str, Any]]:
    """A line a launch, in passes over x; `again` is how often each byte was asked for."""
    lines = []
    for row in result["rows"]:
        unique, requested = row["read"] + row["written"], row["requested_read"] + row["requested_written"]
        lines.append(
            {
                "pass": row["pass"],
                "kernel": row["name"],
                "reads": row["read"] / result["x_bytes"],
                "writes": row["written"] / result["x_bytes"],
                "again": requested / unique if unique else 0.0,
            }
        )
    return lines


def summary(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line a subject: passes and memory kept, beside the limits and separate operators."""
    lines = []
    for result in results:
        limits = result["limits"] or (None, None, None)
        lines.append(
            {
                "operator": result["operator"],
                "input": result["label"],
                "forward": result["forward"],
                "≤ forward": limits[0],
                "backward": result["backward"],
                "≤ backward": limits[1],
                "kept": result["saved"],
                "≤ kept": limits[2],
                "eager": f"{result['eager_forward']:.3g} + {result['eager_backward']:.3g}",
            }
        )
    return lines


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.traffic", description=__doc__.split("\n\n")[0])
    parser.add_argument("--match", default="", help="only subjects whose operator and input hold this text")
    parser.add_argument("--output", type=pathlib.Path, help="folder of the JSON, instead of benchmarks/results")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Counts, prints, writes the JSON; returns the exit status."""
    options = _parse(arguments)
    results = []
    for subject in SUBJECTS:
        name = f"{subject.operator} {subject.label}"
        if options.match not in name:
            continue
        reason = "Triton is not installed" if importlib.util.find_spec("triton") is None else missing(subject)
        if reason is not None:
            print(f"{name}: not counted: {reason}", file=sys.stderr)
            continue
        results.append(measure(subject))
        print(f"\n{name}, in passes over x\n{reporting.table(launch_table(results[-1]))}")
    if not results:
        print("benchmarks.traffic: nothing was counted", file=sys.stderr)
        return 2
    print(f"\n{reporting.table(summary(results))}")
    if options.output or not options.match:
        content = {"triton": importlib.metadata.version("triton"), "results": results}
        print(reporting.save("traffic", content, options.output))
    broken = failures(results)
    for line in broken:
        print(f"- {line}")
    for line in notes(results):
        print(f"(note) {line}")
    return 1 if broken else 0


if __name__ == "__main__":
    # The interpreter is chosen when the kernels are imported, which the first call does.
    os.environ["TRITON_INTERPRET"] = "1"
    sys.exit(main())
