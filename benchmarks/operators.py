"""The fused operators beside what one would use instead: inputs, alternatives, agreement with float64, floors.

Alternatives on a GPU: Triton, eager contiguous and channels-last, eager with cuDNN's and with PyTorch's own depthwise
kernels, torch.compile; on a CPU: native, eager contiguous and channels-last, torch.compile. Training mode. Nothing is
timed that is not as near to float64 as eager is. The floor is the larger of two times: the bytes that the scheme moves
at the rate of a copy of x, and its operations at the rate of a matrix product, both measured in the same run.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from benchmarks import agreement, model, timing
from benchmarks.timing import DEVICE
from fastcifar import dispatch, functional

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
# Compiling takes longer than all else: only these, unless --compile asks for all.
COMPILED = {(512, 32, 32, 3, 1), (512, 64, 16, 3, 2), (512, 32, 32, False), LARGE_DEPTHWISE[0], LARGE_BATCH_NORM[0]}


class Variant:
    """One implementation with leaves of its own."""

    def __init__(self, function: Callable, subject: Subject, *, layout: torch.memory_format, context: Callable):
        self.function, self.options, self.context = function, subject.options, context
        self.leaves = {
            name: (leaf.detach().contiguous(memory_format=layout) if leaf.dim() == 4 else leaf.detach().clone())
            .requires_grad_()
            for name, leaf in subject.leaves.items()
        }  # fmt: skip
        self.dz = subject.dz.contiguous(memory_format=layout)
        self.z: torch.Tensor | None = None

    def step(self) -> Iterator[str]:
        """Forward and backward, for `timing.in_turns`."""
        self.z = None
        for leaf in self.leaves.values():
            leaf.grad = None
        with self.context():
            yield ""
            self.z = self.function(**self.leaves, **self.options, training=True)
            yield "forward"
            self.z.backward(self.dz)
            yield "backward"

    def results(self) -> list[torch.Tensor]:
        """Output and gradients of one step, float64."""
        timing.run(self.step)
        found = [t.detach().double() for t in (self.z, *(leaf.grad for leaf in self.leaves.values()))]
        self.z = None
        return found


class Subject:
    """One call of an operator: leaves, the gradient of its output, and what the scheme of this device moves."""

    def __init__(self, operator: str, shape: Sequence[int], label: str, leaves: dict, options: dict[str, Any]):
        self.operator, self.shape, self.label, self.options = operator, tuple(shape), label, options
        self.leaves = {name: tensor.requires_grad_() for name, tensor in leaves.items()}
        with torch.no_grad():
            z = self.call("reference")
        self.dz = _normal(*z.shape, dtype=z.dtype, device=z.device, seed=1)

    @property
    def x(self) -> torch.Tensor:
        """The input."""
        return self.leaves["x"]

    @property
    def kernel_size(self) -> tuple[int, int] | None:
        """Of a convolution."""
        return tuple(self.leaves["weight"].shape[2:]) if self.operator == "depthwise_conv_bn_act" else None

    def call(self, impl: str) -> torch.Tensor:
        """The output."""
        return self.function(impl)(**self.leaves, **self.options, training=True)

    def function(self, impl: str) -> Callable[..., torch.Tensor]:
        """The operator by this implementation."""
        return functools.partial(getattr(functional, self.operator), impl=impl)

    def variant(self, impl: str, *, compiled: bool = False, contiguous: bool = False, context=contextlib.nullcontext):
        """This implementation, compiled or in another layout."""
        function = self.function(impl)
        if compiled:
            function = torch.compile(function, dynamic=False)
        layout = torch.contiguous_format if contiguous else torch.channels_last
        return Variant(function, self, layout=layout, context=context)

    def exact(self) -> list[torch.Tensor]:
        """Output and gradients in float64."""
        kept, self.leaves = self.leaves, {name: leaf.detach().double() for name, leaf in self.leaves.items()}
        dz, self.dz = self.dz, self.dz.double()
        try:
            return self.variant("reference").results()
        finally:
            self.leaves, self.dz = kept, dz

    def bytes_moved(self) -> dict[str, int]:
        """By the fused scheme of this device in each phase."""
        x, z = (t.numel() * t.element_size() for t in (self.x, self.dz))
        kernel = None if self.kernel_size is None else self.kernel_size[0]
        residual, on_gpu = "residual" in self.leaves, DEVICE.type == "cuda"
        return _phases(*model.fused_bytes(x, z, kernel=kernel, residual=residual, on_gpu=on_gpu))

    def operations(self) -> dict[str, int]:
        """Of each phase."""
        taps = 0 if self.kernel_size is None else self.kernel_size[0] * self.kernel_size[1]
        return _phases(*model.fused_operations(self.dz.numel(), taps))


def _phases(forward: int, backward: int) -> dict[str, int]:
    return {"forward": forward, "backward": backward, "both": forward + backward}


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
    return Subject("depthwise_conv_bn_act", shape, label, leaves, {"stride": stride, "padding": kernel // 2})


def batch_norm_subject(shape: tuple[int, int, int, bool], dtype: torch.dtype, device: torch.device) -> Subject:
    """Batch norm (+ residual) + ReLU."""
    batch, channels, size, residual = shape
    make = functools.partial(_normal, device=device, dtype=dtype)
    leaves = {"x": make(batch, channels, size, size)}
    leaves |= {"weight": torch.ones(channels, device=device), "bias": torch.zeros(channels, device=device)}
    if residual:
        leaves["residual"] = make(batch, channels, size, size, seed=3)
    label = f"{batch}×{channels}×{size}²{' + residual' if residual else ''}"
    return Subject("batch_norm_act", shape, label, leaves, {})


def makers(dtype: torch.dtype) -> list[functools.partial]:
    """Makers of all subjects for this device; their first argument is the shape."""
    large = DEVICE.type == "cuda"
    shapes = [(depthwise_subject, shape) for shape in [*DEPTHWISE, *(LARGE_DEPTHWISE if large else [])]]
    shapes += [(batch_norm_subject, shape) for shape in [*BATCH_NORM, *(LARGE_BATCH_NORM if large else [])]]
    return [functools.partial(make, shape, dtype, DEVICE) for make, shape in shapes]


def tiny(make: functools.partial) -> Subject:
    """The same call with two images of at most 32 channels and 9×9 pixels."""
    batch, channels, size, *rest = make.args[0]
    return make.func((min(batch, 2), min(channels, 32), min(size, 9), *rest), *make.args[1:])


def ours(subject: Subject) -> str | None:
    """The implementation that `auto` takes, where it is not the reference."""
    call = dispatch.Call(subject.x.device, subject.x.dtype, subject.kernel_size)
    for implementation in dispatch.implementations(subject.operator):
        if implementation.obstacle(call) is None and implementation.reluctance(call) is None:
            return None if implementation.name == "reference" else implementation.name
    return None


def variants(subject: Subject, compiled: bool) -> dict[str, Variant]:
    """What is compared, by name; the first is ours where there is one."""
    name = ours(subject)
    found = {} if name is None else {name: subject.variant(name)}
    found |= {
        "eager": subject.variant("reference"),
        "eager, contiguous": subject.variant("reference", contiguous=True),
    }
    if DEVICE.type == "cuda" and subject.kernel_size is not None:
        for kind in ("cudnn", "native"):
            context = functools.partial(torch.backends.cudnn.flags, **_depthwise_flags(kind))
            found[f"eager, {kind} depthwise"] = subject.variant("reference", context=context)
    if compiled:
        found["torch.compile"] = subject.variant("reference", compiled=True)
    return found


def _depthwise_flags(kind: str) -> dict[str, Any]:
    if hasattr(torch.backends.cudnn, "depthwise_kernel"):
        return {"enabled": True, "depthwise_kernel": kind}
    return {"enabled": kind == "cudnn"}


def measure(subject: Subject, *, compiled: bool, **effort: Any) -> tuple[list[dict[str, Any]], list[float]]:
    """Rows of every alternative and phase, and the rounds of ours (of eager where there is none) as a whole.

    Raises:
        ArithmeticError: ours does not agree with float64; nothing was timed.
    """
    compared = variants(subject, compiled)
    results = {name: variant.results for name, variant in compared.items()}
    eps = torch.finfo(subject.x.dtype).eps
    refused = agreement.refused(results, subject.exact(), eager="eager", ours=ours(subject), eps=eps)
    source = subject.x.detach()
    target = torch.empty_like(source)
    calls = {name: variant.step for name, variant in compared.items() if name not in refused}
    calls["copy"] = lambda: target.copy_(source)
    size = 2 * source.numel() * source.element_size()
    about = {"operator": subject.operator, "input": subject.label}
    return timing.measure(
        calls, about, refused, copied=size, moved=subject.bytes_moved(), operations=subject.operations(), **effort
    )
