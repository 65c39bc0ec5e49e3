"""Inputs of batch_norm_act, and the comparison with float64 that every implementation has to pass."""

import functools

import oracle
import torch

from fastcifar import functional, reference

reference_impl = functools.partial(functional.batch_norm_act, impl="reference")


def inputs_of(shape, *, residual=True, affine=True, mean=0.0, layout="channels-last"):
    generator = torch.Generator().manual_seed(0)
    channels = shape[1]

    def normal(*sizes):
        return torch.randn(*sizes, generator=generator)

    def laid_out(tensor):
        if layout == "channels-last" and tensor.dim() == 4:
            return tensor.contiguous(memory_format=torch.channels_last)
        if layout == "sliced":
            return torch.zeros(*(2 * n for n in shape))[tuple(slice(0, n) for n in shape)].copy_(tensor)
        return tensor

    return {
        "x": laid_out(mean + 2 * normal(*shape)),
        "weight": 0.5 + torch.rand(channels, generator=generator) if affine else None,
        "bias": 0.3 * normal(channels) if affine else None,
        "running_mean": mean + 0.1 * normal(channels),
        "running_var": 0.5 + torch.rand(channels, generator=generator),
        "residual": laid_out(normal(*shape)) if residual else None,
    }


def stored_gradient_floors(inputs, dz, dtype, activation):
    """What storing dA, the residual's gradient, in `dtype` may change in dβ = Σ dA and dγ = Σ dA·ŷ, in training."""
    inputs = oracle.rounded(inputs, dtype)
    x, residual, weight, bias = (
        None if inputs[name] is None else inputs[name].double() for name in ("x", "residual", "weight", "bias")
    )
    normalised = torch.nn.functional.batch_norm(x, None, None, None, None, True)
    before = torch.nn.functional.batch_norm(x, None, None, weight, bias, True) + residual
    before.requires_grad_()
    (da,) = torch.autograd.grad(reference.activate(before, activation, 0.1), before, dz.to(dtype).double())
    sums = (da.abs().transpose(0, 1).flatten(1), (da * normalised).abs().transpose(0, 1).flatten(1))
    bias, weight = (torch.finfo(dtype).eps / 2 * float(terms.sum(1).max()) for terms in sums)
    return {"bias": bias, "weight": weight}


def hold(impl, shape, dtype=torch.float32, activation="silu", training=True, **options):
    """Where an activation has corners, a low-precision sum may fall on the other side: smooth ones hold the budget."""
    inputs = inputs_of(shape, **options)
    function, dz, floors = functools.partial(functional.batch_norm_act, impl=impl), oracle.gradient_like(shape), None
    if training and inputs["residual"] is not None:
        floors = stored_gradient_floors(inputs, dz, dtype, activation)
    oracle.check(
        function, reference_impl, inputs, dtype, dz, floors, activation=activation,
        negative_slope=0.1, training=training, momentum=0.3,
    )  # fmt: skip


def hold_corners(impl, activation):
    """At the corners of an activation and far from them, value and derivative are torch's."""
    values = [-3.0, 0.0, 3.0, 6.0, -88.5, 88.5, -1e30, 1e30]
    found = []
    for function in (functools.partial(functional.batch_norm_act, impl=impl), reference_impl):
        x = torch.tensor(values).repeat_interleave(2).view(-1, 1).requires_grad_()
        z = function(
            x, None, None, torch.zeros(1), torch.ones(1), training=False, activation=activation, negative_slope=0.1,
            eps=1e-30,
        )  # fmt: skip
        z.sum().backward()
        found.append((z.detach(), x.grad))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=1e-30)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-6, atol=1e-30)


def hold_infinity(impl):
    """A channel with an infinite value has no statistics; the others keep theirs."""
    found = []
    for function in (functools.partial(functional.batch_norm_act, impl=impl), reference_impl):
        inputs = inputs_of((4, 3, 8, 8), residual=False)
        inputs["x"][1, 1, 2, 3] = float("inf")
        z = function(**inputs, training=True, activation="relu")
        found.append((z, inputs["running_var"]))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert found[0][0][:, 1].isnan().all() and found[0][1].isnan().tolist() == [False, True, False]
