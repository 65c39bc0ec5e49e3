"""Activations and their derivatives on blocks of fp32 values, chosen at compile time by name."""

import triton
import triton.language as tl

ACTIVATIONS = ("none", "relu", "relu6", "leaky_relu", "silu", "hardswish")


@triton.jit
def activate(value, ACTIVATION: tl.constexpr, negative_slope):
    """The activation of `value`; `negative_slope` serves leaky_relu only."""
    if ACTIVATION == "relu":
        value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "relu6":
        value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
        value = tl.minimum(value, 6.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "leaky_relu":
        value = tl.where(value > 0.0, value, value * negative_slope)
    elif ACTIVATION == "silu":
        value = value / (1.0 + tl.exp(-value))
    elif ACTIVATION == "hardswish":
        inner = tl.maximum(value + 3.0, 0.0, propagate_nan=tl.PropagateNan.ALL)
        value = value * tl.minimum(inner, 6.0, propagate_nan=tl.PropagateNan.ALL) * (1.0 / 6.0)
    return value


@triton.jit
def activation_gradient(gradient, value, ACTIVATION: tl.constexpr, negative_slope):
    """`gradient` times the activation's derivative at `value`; at its corners torch's choice of the two sides."""
    if ACTIVATION == "relu":
        gradient = tl.where(value > 0.0, gradient, 0.0)
    elif ACTIVATION == "relu6":
        gradient = tl.where((value > 0.0) & (value < 6.0), gradient, 0.0)
    elif ACTIVATION == "leaky_relu":
        gradient = tl.where(value > 0.0, gradient, gradient * negative_slope)
    elif ACTIVATION == "silu":
        sigmoid = 1.0 / (1.0 + tl.exp(-value))
        gradient = gradient * sigmoid * (1.0 + value * (1.0 - sigmoid))
    elif ACTIVATION == "hardswish":
        inside = gradient * (value * (1.0 / 3.0) + 0.5)
        gradient = tl.where(value <= -3.0, 0.0, tl.where(value < 3.0, inside, gradient))
    return gradient
