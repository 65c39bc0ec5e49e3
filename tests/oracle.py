"""What kernels are held to: the reference in float64, and error budgets derived from the reference itself.

The budget of an implementation is twice what the reference in the same low precision errs against float64, plus one
rounding of the result: an implementation may be as wrong as the arithmetic must be, not more.
"""

from __future__ import annotations

import torch

from fastcifar import reference


def run(function, inputs, dtype, dz, **options):
    """Output, gradients and running statistics, in float64, of a call whose inputs are cast to `dtype` first.

    `inputs` maps x, weight, bn_weight, bn_bias, running_mean, running_var (and residual) to float32 tensors or None.
    x, weight and residual take `dtype`; the rest float32, or float64 with float64.
    """
    leaves = {}
    for name, tensor in inputs.items():
        if tensor is None:
            leaves[name] = None
            continue
        kind = dtype if name in ("x", "weight", "residual") else torch.promote_types(dtype, torch.float32)
        if name == "weight" and tensor.dim() == 1:
            kind = torch.promote_types(dtype, torch.float32)
        leaves[name] = restride(tensor.to(kind), tensor).requires_grad_(not name.startswith("running"))
    z = function(**leaves, **options)
    results = {"z": z.detach().double()}
    if dz is not None:
        z.backward(dz.to(z.dtype))
    for name, leaf in leaves.items():
        if leaf is not None:
            value = leaf if name.startswith("running") else leaf.grad
            results[name] = None if value is None else value.detach().double()
    return results


def restride(tensor, like):
    """A copy of the tensor with the strides of `like`, so that a layout under test survives the cast."""
    if tensor.dim() == 4 and not like.is_contiguous() and not like.is_contiguous(memory_format=torch.channels_last):
        wide = torch.zeros(*(2 * n for n in like.shape[:-1]), 2 * like.shape[-1], dtype=tensor.dtype)
        if like.stride(1) == 1:
            wide = wide.contiguous(memory_format=torch.channels_last)
        view = wide[tuple(slice(0, n) for n in like.shape)]
        return view.copy_(tensor).detach()
    return torch.empty_like(tensor, memory_format=torch.preserve_format).copy_(tensor).detach()


def rounded(inputs, dtype):
    """The inputs as `dtype` holds them, so that all precisions start from the same numbers."""
    return {
        name: restride(tensor.to(dtype).float(), tensor)
        if tensor is not None and name in ("x", "weight", "residual") and not (name == "weight" and tensor.dim() == 1)
        else tensor
        for name, tensor in inputs.items()
    }


def check(function, expected, inputs, dtype, dz=None, floors=None, **options):
    """Asserts that `function` is within its budget of the float64 reference in every result.

    `floors` gives results that are ill-conditioned (large terms that cancel) a least budget.
    """
    inputs = rounded(inputs, dtype)
    dz = None if dz is None else dz.to(dtype).float()
    exact = run(expected, inputs, torch.float64, dz, **options)
    low = run(expected, inputs, dtype, dz, **options)
    got = run(function, inputs, dtype, dz, **options)
    assert got.keys() == exact.keys()
    for name, value in got.items():
        if exact[name] is None:
            assert value is None, f"{name} has a gradient that the reference has not"
            continue
        assert value.shape == exact[name].shape
        kind = dtype if name in ("z", "x", "weight", "residual") else torch.float32
        within(value, exact[name], low[name], kind, name, (floors or {}).get(name, 0.0))


def within(value, exact, low, dtype, name="", floor=0.0):
    """Asserts |value − exact| ≤ 2·max|low − exact| + one rounding of the largest value, or `floor` if that is more."""
    if value.numel() == 0:
        return
    scale = exact.abs().max()
    budget = 2 * (low - exact).abs().max() + torch.finfo(dtype).eps * scale
    budget = max(budget + torch.finfo(torch.float32).eps * (1 + scale), floor)
    error = (value - exact).abs().max()
    assert error <= budget, f"{name}: error {error:.3g} exceeds the budget {budget:.3g} (scale {scale:.3g})"


def weight_gradient_floor(inputs, dz, *, stride, padding, activation):
    """Four roundings of the terms that a weight gradient sums: 4·eps·max Σ|dy|·|x|, in training, float32."""
    x, weight, gamma, beta = (inputs[name].double() for name in ("x", "weight", "bn_weight", "bn_bias"))
    channels = x.shape[1]
    y = torch.nn.functional.conv2d(x, weight, None, stride, padding, 1, channels).requires_grad_()
    z = reference.activate(torch.nn.functional.batch_norm(y, None, None, gamma, beta, True), activation)
    (dy,) = torch.autograd.grad(z, y, dz.double())
    terms = torch.nn.grad.conv2d_weight(x.abs(), weight.shape, dy.abs(), stride, padding, 1, channels)
    return 4 * torch.finfo(torch.float32).eps * float(terms.max())


def depthwise_inputs(
    batch, channels, height, width, kernel_size, *, layout="channels-last", mean=0.0, seed=0, affine=True, running=True
):
    """Random inputs of the depthwise operator, float32; `layout` is channels-last, contiguous or sliced."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    x = mean + normal(batch, channels, height, width) * (1.0 + torch.rand(channels, 1, 1, generator=generator))
    if layout == "channels-last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "sliced":
        wide = torch.zeros(2 * batch, 2 * channels, 2 * height, 2 * width).contiguous(memory_format=torch.channels_last)
        x = wide[:batch, :channels, :height, :width].copy_(x)
    return {
        "x": x,
        "weight": normal(channels, 1, kernel_size, kernel_size) / kernel_size,
        "bn_weight": 0.5 + torch.rand(channels, generator=generator) if affine else None,
        "bn_bias": 0.3 * normal(channels) if affine else None,
        "running_mean": mean + 0.1 * normal(channels) if running else None,
        "running_var": 0.5 + torch.rand(channels, generator=generator) if running else None,
    }


def gradient_like(shape, seed=1):
    """A random gradient of that shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
