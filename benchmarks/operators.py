"""`python -m benchmarks.operators`: the fused operators beside what one would use instead, and their floor.

On a GPU: Triton, eager channels-last, eager with cuDNN's and with PyTorch's own depthwise kernels, torch.compile
default and max-autotune. On a CPU: native, eager channels-last, and torch.compile with --compile. Forward and backward
in training mode, interleaved medians. What is not as near to float64 as the reference is not timed. The floor is the
larger of two times: the bytes that the scheme moves at the rate of a plain copy, and its multiply-adds at the rate of
a matrix product, both measured here. Writes results/operators-DEVICE-DTYPE.json.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks import reporting
from fastcifar import dispatch, functional, native

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# batch, channels, height = width, kernel size, stride: ds_resnet at 512, MobileNetV2 at 16 images of 224².
DEPTHWISE = [
    (512, 32, 32, 3, 1),
    (512, 64, 16, 3, 1),
    (512, 96, 8, 3, 1),
    (512, 128, 4, 3, 1),
    (512, 32, 32, 3, 2),
    (512, 64, 16, 3, 2),
    (512, 96, 8, 3, 2),
    (16, 32, 112, 3, 1),
    (16, 96, 112, 3, 2),
    (16, 576, 14, 3, 1),
    (16, 960, 7, 3, 1),
    (128, 32, 32, 5, 1),
]
# batch, channels, height = width, with a residual
BATCH_NORM = [
    (512, 32, 32, False),
    (512, 32, 32, True),
    (512, 64, 16, False),
    (512, 64, 16, True),
    (512, 128, 4, True),
    (16, 96, 56, False),
]
LARGE_DEPTHWISE = [(512, 128, 32, 3, 1), (128, 96, 112, 3, 1), (128, 240, 28, 5, 1)]
LARGE_BATCH_NORM = [(512, 128, 32, True), (128, 144, 56, False)]


class Subject:
    """One call: leaves, the gradient of its output, and what the scheme of this device moves and computes."""

    def __init__(self, operator: str, label: str, leaves: dict[str, torch.Tensor], options: dict[str, Any]):
        self.operator, self.label, self.options = operator, label, options
        self.leaves = {name: tensor.requires_grad_() for name, tensor in leaves.items()}
        with torch.no_grad():
            z = self.call("reference", self.leaves)
        generator = torch.Generator().manual_seed(1)
        dz = torch.randn(z.shape, generator=generator).to(z)
        self.dz = dz.contiguous(memory_format=torch.channels_last)

    @property
    def x(self) -> torch.Tensor:
        """The input."""
        return self.leaves["x"]

    @property
    def kernel_size(self) -> tuple[int, int] | None:
        """Of a convolution."""
        return tuple(self.leaves["weight"].shape[2:]) if self.operator == "depthwise_conv_bn_act" else None

    def call(self, impl: str, leaves: dict[str, torch.Tensor]) -> torch.Tensor:
        """The output."""
        return getattr(functional, self.operator)(**leaves, **self.options, training=True, impl=impl)

    def step(self, impl: str) -> Callable[[], torch.Tensor]:
        """Forward and backward with this implementation."""

        def run() -> torch.Tensor:
            for leaf in self.leaves.values():
                leaf.grad = None
            z = self.call(impl, self.leaves)
            z.backward(self.dz)
            return z

        return run

    def agrees(self, impl: str) -> bool:
        """Whether all results are as near to float64 as the reference's in the same dtype, within a factor of three."""

        def run(name: str, leaves: dict[str, torch.Tensor]) -> list[torch.Tensor]:
            copies = {key: leaf.detach().clone().requires_grad_() for key, leaf in leaves.items()}
            z = self.call(name, copies)
            z.backward(self.dz.to(z))
            return [t.detach().double() for t in (z, *(leaf.grad for leaf in copies.values()))]

        exact = run("reference", {name: leaf.detach().double() for name, leaf in self.leaves.items()})
        low, got = run("reference", self.leaves), run(impl, self.leaves)
        eps = torch.finfo(self.x.dtype).eps
        return all(
            (g - e).abs().max() <= 3 * (w - e).abs().max() + 4 * eps * e.abs().max()
            for g, w, e in zip(got, low, exact, strict=True)
        )

    def bytes_moved(self) -> int:
        """By the fused scheme: recomputed on a GPU, with y stored on a CPU and for strides."""
        x, z = (t.numel() * t.element_size() for t in (self.x, self.dz))
        if self.operator == "batch_norm_act":
            return (11 if "residual" in self.leaves else 8) * x
        if self.x.is_cuda and 2 * z > x:
            return (5 if self.kernel_size == (3, 3) else 7) * x + (3 if self.kernel_size == (3, 3) else 5) * z
        return 3 * x + 7 * z

    def multiply_adds(self) -> int:
        """Of a convolution and its two gradients; what a GPU repeats of them costs nothing beside its memory."""
        taps = 0 if self.kernel_size is None else self.kernel_size[0] * self.kernel_size[1]
        return 3 * taps * self.dz.numel()


def _normal(*shape: int, device: torch.device, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    tensor = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def depthwise_subject(shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device) -> Subject:
    """Depthwise convolution + batch norm + ReLU."""
    batch, channels, size, kernel, stride = shape
    make = functools.partial(_normal, device=device, dtype=dtype)
    leaves = {"x": make(batch, channels, size, size), "weight": make(channels, 1, kernel, kernel, seed=2) / kernel}
    leaves |= {"bn_weight": torch.ones(channels, device=device), "bn_bias": torch.zeros(channels, device=device)}
    label = f"{batch}×{channels}×{size}² {kernel}×{kernel} s{stride}"
    return Subject("depthwise_conv_bn_act", label, leaves, {"stride": stride, "padding": kernel // 2})


def batch_norm_subject(shape: tuple[int, int, int, bool], dtype: torch.dtype, device: torch.device) -> Subject:
    """Batch norm (+ residual) + ReLU."""
    batch, channels, size, residual = shape
    make = functools.partial(_normal, device=device, dtype=dtype)
    leaves = {"x": make(batch, channels, size, size)}
    leaves |= {"weight": torch.ones(channels, device=device), "bias": torch.zeros(channels, device=device)}
    if residual:
        leaves["residual"] = make(batch, channels, size, size, seed=3)
    label = f"{batch}×{channels}×{size}²{' + residual' if residual else ''}"
    return Subject("batch_norm_act", label, leaves, {})


def subjects(dtype: torch.dtype, device: torch.device) -> Iterator[Callable[[], Subject]]:
    """Makers of all subjects for this device."""
    large = device.type == "cuda"
    for shape in [*DEPTHWISE, *(LARGE_DEPTHWISE if large else [])]:
        yield functools.partial(depthwise_subject, shape, dtype, device)
    for shape in [*BATCH_NORM, *(LARGE_BATCH_NORM if large else [])]:
        yield functools.partial(batch_norm_subject, shape, dtype, device)


def alternatives(subject: Subject, compiled: bool) -> dict[str, Callable[[], Any]]:
    """What is timed, by name."""
    calls: dict[str, Callable[[], Any]] = {}
    call = dispatch.Call(subject.x.device, subject.x.dtype, subject.kernel_size)
    for implementation in dispatch.implementations(subject.operator):
        if implementation.obstacle(call) is None and implementation.reluctance(call) is None:
            name = "eager" if implementation.name == "reference" else implementation.name
            if name == "eager" or subject.agrees(implementation.name):
                calls[name] = subject.step(implementation.name)
    if subject.x.is_cuda and subject.kernel_size is not None:
        calls |= {f"eager, {kind}": _with_depthwise_kernel(subject, kind) for kind in ("cudnn", "native")}
    if compiled:
        calls["torch.compile"] = torch.compile(subject.step("reference"))
        if subject.x.is_cuda:
            calls["max-autotune"] = torch.compile(subject.step("reference"), mode="max-autotune-no-cudagraphs")
    source = subject.x.detach()
    target = torch.empty_like(source)
    calls["copy"] = lambda: target.copy_(source)
    return calls


def _with_depthwise_kernel(subject: Subject, kind: str) -> Callable[[], Any]:
    step = subject.step("reference")

    def run() -> Any:
        with torch.backends.cudnn.flags(enabled=kind == "cudnn"):
            return step()

    return run


@functools.cache
def multiply_add_rate(device: torch.device) -> float:
    """Multiply-adds a second of a float32 matrix product here; infinite on a GPU, where memory alone is the floor."""
    if device.type == "cuda":
        return float("inf")
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    return 1024**3 / min(reporting.interleaved({"matmul": lambda: a @ b}, rounds=15).values())


def measure(subject: Subject, *, rounds: int, compiled: bool) -> dict[str, Any]:
    """The row of one subject."""
    seconds = reporting.interleaved(alternatives(subject, compiled), rounds=rounds)
    copied = seconds.pop("copy")
    copy_rate = 2 * subject.x.numel() * subject.x.element_size() / copied
    floor = max(subject.bytes_moved() / copy_rate, subject.multiply_adds() / multiply_add_rate(subject.x.device))
    ours = next((name for name in ("triton", "native") if name in seconds), None)
    row: dict[str, Any] = {"operator": subject.operator, "input": subject.label}
    row |= {f"{name}, ms": 1000 * value for name, value in seconds.items()}
    row["floor, ms"] = 1000 * floor
    if ours:
        row["eager / ours"] = seconds["eager"] / seconds[ours]
        if compiled:
            row["compile / ours"] = seconds["torch.compile"] / seconds[ours]
        row["ours / floor"] = seconds[ours] / floor
        row["% of copy rate"] = 100 * subject.bytes_moved() / seconds[ours] / copy_rate
    return row


def main() -> None:
    """Measures all subjects, prints the table, writes the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.operators", description=__doc__.split("\n\n")[0])
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--compile", action="store_true", help="also torch.compile (always on a GPU)")
    parser.add_argument("--match", default="", help="only subjects whose operator and input hold this; stores nothing")
    parser.add_argument("--output", type=pathlib.Path, help="folder of the JSON, instead of benchmarks/results")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tuned = device.type == "cpu" and native.tune_allocator()
    rows = []
    for make in subjects(DTYPES[options.dtype], device):
        subject = make()
        if options.match not in f"{subject.operator} {subject.label}":
            continue
        rows.append(measure(subject, rounds=options.rounds, compiled=options.compile or device.type == "cuda"))
        torch.compiler.reset()
    for operator in dict.fromkeys(row["operator"] for row in rows):
        print(reporting.table([row for row in rows if row["operator"] == operator]), end="\n\n")
    if options.output or not options.match:
        content = {"dtype": options.dtype, "allocator_tuned": tuned, "rows": rows}
        print(reporting.save(f"operators-{device.type}-{options.dtype}", content, options.output))


if __name__ == "__main__":
    main()
