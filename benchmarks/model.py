"""What a training step of ds_resnet must move and compute, layer by layer, and how fast a device could do it at best.

Counted from the network itself: tensors in bfloat16, each read and written as often as the implementation's passes do
(a CPU stores what the depthwise convolution gives, a GPU computes it again). Convolutions read their input and write
their output; backward they read the output's gradient twice, the input once, and write its gradient. A block's input
receives the sum of two gradients. Weights, vectors and the head's few numbers are left out. A layer's floor is the
larger of bytes over the copy rate and operations over the rate of their unit: bfloat16 products for convolutions,
float32 arithmetic for the fused operators.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastcifar import models
from fastcifar.models.ds_resnet import ResidualBlock
from fastcifar.nn import BatchNormAct, DepthwiseConvBNAct

BATCH = 512
# Vendor's data sheet for the SXM part: memory, float32 and dense bfloat16 arithmetic.
H200 = {"memory, GB/s": 4800.0, "float32, GFLOP/s": 67_000.0, "bfloat16, GFLOP/s": 989_000.0}


# Operations a value of normalising and activating: two sums, scale and shift, activation; backward all of it again, two
# more sums, the gradient.
NORMALISING, NORMALISING_BACKWARD = 6, 12


def fused_bytes(x: int, z: int, *, kernel: int | None, residual: bool, on_gpu: bool) -> tuple[int, int]:
    """Bytes that a fused operator moves forward and backward.

    Args:
        x, z: bytes of input and output.
        kernel: size of the depthwise convolution, None: batch norm alone.
        residual: whether one is added.
        on_gpu: whether the convolution is computed again instead of stored (not for strides).
    """
    if kernel is None:
        return (4 * x, 7 * x) if residual else (3 * x, 5 * x)
    if on_gpu and 2 * z > x:
        return 2 * x + z, 3 * x + 2 * z if kernel == 3 else 5 * x + 4 * z
    # x → y, y → z; y, dz → sums, x, y, dz → dx.
    return x + 3 * z, 2 * x + 4 * z


def fused_operations(values: int, taps: int) -> tuple[int, int]:
    """Operations of a fused operator of so many output values forward and backward: a convolution and its two
    gradients, and normalising; what a GPU repeats of them costs nothing beside its memory."""
    return values * (2 * taps + NORMALISING), values * (4 * taps + NORMALISING_BACKWARD)


@dataclass(frozen=True)
class Layer:
    """Bytes and operations (two a multiply-add) of one layer for the whole batch."""

    name: str
    kind: str
    shape: str
    forward_bytes: int
    backward_bytes: int
    forward_operations: int
    backward_operations: int

    @property
    def bytes(self) -> int:
        """Of both."""
        return self.forward_bytes + self.backward_bytes

    @property
    def operations(self) -> int:
        """Of both."""
        return self.forward_operations + self.backward_operations

    def seconds(self, rates: Mapping[str, float]) -> float:
        """The floor on a device of these rates, named as in `H200`."""
        arithmetic = rates[f"{'bfloat16' if self.kind == 'convolution' else 'float32'}, GFLOP/s"]
        return max(self.bytes / rates["memory, GB/s"], self.operations / arithmetic) / 1e9


def layers(model: str = "ds_resnet", *, batch: int = BATCH, on_gpu: bool) -> list[Layer]:
    """Every layer that touches whole images, in the order of the forward pass."""
    network = models.create_model(model, impl="reference")
    found: list[Layer] = []

    def visit(name: str, module: nn.Module):
        def hook(module, inputs, output):
            given = [tensor for tensor in inputs if tensor is not None]
            found.append(_layer(name, module, given, output, batch, on_gpu, first=not found))

        module.register_forward_hook(hook)

    for name, module in network.named_modules():
        if isinstance(module, (DepthwiseConvBNAct, BatchNormAct, nn.Conv2d, ResidualBlock)):
            visit(name, module)
    with torch.no_grad():
        network(torch.randn(2, 3, 32, 32))
    return found


def _layer(name, module, inputs: Sequence[torch.Tensor], output, batch: int, on_gpu: bool, *, first: bool) -> Layer:
    x, z = (2 * tensor[0].numel() * batch for tensor in (inputs[0], output))
    values = output[0].numel() * batch
    channels, height, width = output.shape[1:]
    shape = f"{inputs[0].shape[1]} → {channels}, {height}×{width}"
    if isinstance(module, nn.Conv2d):
        operations = 2 * values * module.weight[0].numel()
        # A strided 1×1 convolution leaves out pixels, but not in the gradient that it writes.
        read = x // module.stride[0] ** 2 if module.kernel_size == (1, 1) else x
        # The images have no gradient.
        backward = (z + x, operations) if first else (2 * z + read + x, 2 * operations)
        return Layer(name, "convolution", shape, read + z, backward[0], operations, backward[1])
    if isinstance(module, ResidualBlock):
        return Layer(name, "gradient sum", shape.partition(" →")[0], 0, 3 * x, 0, 0)
    if isinstance(module, BatchNormAct):
        moved = fused_bytes(x, z, kernel=None, residual=len(inputs) > 1, on_gpu=on_gpu)
        return Layer(name, "batch_norm_act", shape, *moved, *fused_operations(values, 0))
    moved = fused_bytes(x, z, kernel=module.weight.shape[-1], residual=False, on_gpu=on_gpu)
    return Layer(name, "depthwise_conv_bn_act", shape, *moved, *fused_operations(values, module.weight[0].numel()))


def rates(machine: Mapping[str, float]) -> dict[str, float]:
    """The stored row of `timing.machine` under the names of `H200`."""
    return {
        "memory, GB/s": machine["copy, GB/s"],
        "float32, GFLOP/s": machine["float32 matrix product, GFLOP/s"],
        "bfloat16, GFLOP/s": machine["bfloat16 matrix product, GFLOP/s"],
    }


def by_kind(found: Sequence[Layer], rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """Bytes, operations and floor of each kind of layer, and of all."""
    rows = []
    for kind in [*dict.fromkeys(layer.kind for layer in found), "all layers"]:
        chosen = [layer for layer in found if kind in (layer.kind, "all layers")]
        rows.append(
            {
                "kind": kind,
                "layers": len(chosen),
                "MB": sum(layer.bytes for layer in chosen) / 1e6,
                "GFLOP": sum(layer.operations for layer in chosen) / 1e9,
                "seconds": sum(layer.seconds(rates) for layer in chosen),
            }
        )
    return rows
