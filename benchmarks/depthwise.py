"""`python -m benchmarks.depthwise`: the depthwise operator beside what one would use instead, and a copy as ceiling.

On a GPU: Triton, eager channels-last, eager with cuDNN's and with PyTorch's own depthwise kernels, torch.compile. On a
CPU: native, eager channels-last, and torch.compile with --compile. Forward and backward in training mode, interleaved
medians. What does not agree with float64 first is not timed. Writes results/depthwise-DEVICE.json.
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import reporting
from fastcifar import dispatch, functional, native

# batch, channels, height = width, kernel size, stride: ds_resnet at 512, MobileNetV2 at 16 images of 224².
SHAPES = [
    (512, 32, 32, 3, 1),
    (512, 32, 32, 3, 2),
    (512, 64, 16, 3, 1),
    (512, 64, 16, 3, 2),
    (512, 96, 8, 3, 1),
    (512, 128, 4, 3, 1),
    (16, 32, 112, 3, 1),
    (16, 96, 112, 3, 2),
    (16, 576, 14, 3, 1),
]
GPU_SHAPES = [*SHAPES, (512, 128, 32, 3, 1), (128, 96, 112, 3, 1), (128, 240, 28, 5, 1)]


class Subject:
    """One shape's tensors, and calls that run forward and backward on them."""

    def __init__(self, shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device):
        batch, channels, size, kernel, self.stride = shape
        self.padding = kernel // 2
        generator = torch.Generator().manual_seed(0)

        def normal(*sizes: int) -> torch.Tensor:
            return torch.randn(*sizes, generator=generator)

        x = normal(batch, channels, size, size).to(device, dtype).contiguous(memory_format=torch.channels_last)
        self.x = x.requires_grad_()
        self.weight = (normal(channels, 1, kernel, kernel) / kernel).to(device, dtype).requires_grad_()
        self.gamma = torch.ones(channels, device=device, requires_grad=True)
        self.beta = torch.zeros(channels, device=device, requires_grad=True)
        out = (size + 2 * self.padding - kernel) // self.stride + 1
        dz = normal(batch, channels, out, out).to(device, dtype)
        self.dz = dz.contiguous(memory_format=torch.channels_last)
        # x twice and z once forward; x, dz twice and dx once backward.
        self.passes_bytes = x.element_size() * (5 * x.numel() + 3 * dz.numel())

    def step(self, impl: str) -> Callable[[], torch.Tensor]:
        """Forward and backward with this implementation."""

        def call() -> torch.Tensor:
            for leaf in (self.x, self.weight, self.gamma, self.beta):
                leaf.grad = None
            z = functional.depthwise_conv_bn_act(
                self.x, self.weight, self.gamma, self.beta,
                stride=self.stride, padding=self.padding, training=True, impl=impl,
            )  # fmt: skip
            z.backward(self.dz)
            return z

        return call

    def agrees(self, impl: str) -> bool:
        """Whether the result is as near to float64 as the reference in the same dtype, within a factor of three."""

        def run(name: str, part: Subject) -> list[torch.Tensor]:
            z = part.step(name)()
            return [t.detach().double() for t in (z, part.x.grad, part.weight.grad, part.gamma.grad, part.beta.grad)]

        exact_subject = object.__new__(Subject)
        exact_subject.__dict__ = {
            name: value.detach().double().requires_grad_(value.requires_grad) if torch.is_tensor(value) else value
            for name, value in self.__dict__.items()
        }
        exact, low, got = run("reference", exact_subject), run("reference", self), run(impl, self)
        eps = torch.finfo(self.x.dtype).eps
        return all(
            (g - e).abs().max() <= 3 * (w - e).abs().max() + 4 * eps * e.abs().max()
            for g, w, e in zip(got, low, exact, strict=True)
        )


def alternatives(subject: Subject, device: torch.device, compiled: bool) -> dict[str, Callable[[], Any]]:
    """What is timed, by name."""
    calls: dict[str, Callable[[], Any]] = {}
    dtype = subject.x.dtype
    for implementation in dispatch.implementations("depthwise_conv_bn_act"):
        call = dispatch.Call(device=device, dtype=dtype, kernel_size=tuple(subject.weight.shape[2:]))
        if implementation.obstacle(call) is None and implementation.reluctance(call) is None:
            name = "eager" if implementation.name == "reference" else implementation.name
            if name == "eager" or subject.agrees(implementation.name):
                calls[name] = subject.step(implementation.name)
    if compiled:
        calls["torch.compile"] = torch.compile(subject.step("reference"))
    source = subject.x.detach()
    target = torch.empty_like(source)
    calls["copy of x"] = lambda: target.copy_(source)
    return calls


def measure(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device, rounds: int, compiled: bool
):
    """The row of one shape."""
    subject = Subject(shape, dtype, device)
    seconds = reporting.interleaved(alternatives(subject, device, compiled), rounds=rounds)
    ours = next((name for name in ("triton", "native") if name in seconds), None)
    copied = 2 * subject.x.numel() * subject.x.element_size() / seconds["copy of x"]
    batch, channels, size, kernel, stride = shape
    row: dict[str, Any] = {"shape": f"{batch}×{channels}×{size}² {kernel}×{kernel} s{stride}"}
    row |= {f"{name}, ms": 1000 * value for name, value in seconds.items() if name != "copy of x"}
    row["times eager"] = seconds["eager"] / seconds[ours] if ours else None
    row["GB/s"] = subject.passes_bytes / seconds[ours] / 1e9 if ours else None
    row["copy GB/s"] = copied / 1e9
    return row


def main() -> None:
    """Measures all shapes, prints the table, writes the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.depthwise", description=__doc__)
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="also torch.compile (always on a GPU)")
    parser.add_argument("--output", type=pathlib.Path, help="folder of the JSON")
    options = parser.parse_args()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[options.dtype]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tuned = native.tune_allocator() if device.type == "cpu" else False
    on_gpu = device.type == "cuda"
    shapes = GPU_SHAPES if on_gpu else SHAPES
    rows = [measure(shape, dtype, device, options.rounds, options.compile or on_gpu) for shape in shapes]
    print(reporting.table(rows))
    content = {"dtype": options.dtype, "allocator_tuned": tuned, "rows": rows}
    print(reporting.save(f"depthwise-{device.type}-{options.dtype}", content, options.output))


if __name__ == "__main__":
    main()
