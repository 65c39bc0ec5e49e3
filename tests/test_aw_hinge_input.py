"""What the adaptive-weighted hinge refuses, and in which words."""

import pytest
import torch
from torch import nn

from fastcifar import dispatch
from fastcifar.nn import AdaptiveWeightedHinge


def logits(*shape, **options):
    return torch.zeros(*shape, **options).requires_grad_()


BAD_CALLS = {
    "shape": (lambda: (logits(4, 2), logits(4)), ValueError, r"real_logits must have shape \(N,\) .* got \(4, 2\)"),
    "empty": (lambda: (logits(4), logits(0)), ValueError, r"fake_logits must have shape .* got \(0,\)"),
    "number": (lambda: (logits(4), 3.0), TypeError, "fake_logits must be a tensor, got float"),
    "integer": (lambda: (torch.zeros(4).long(), logits(4)), TypeError, "real_logits must be float32.*int64"),
    "dtypes": (lambda: (logits(4), logits(4).double()), TypeError, "same dtype, got torch.float32 and torch.float64"),
    "detached": (lambda: (logits(4), torch.zeros(4)), ValueError, "fake_logits does not require grad; compute it"),
    "leaves": (lambda: (logits(4), logits(4)), ValueError, "depend on none of the 2 parameters"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_logits(case):
    arguments, error, message = BAD_CALLS[case]
    with pytest.raises(error, match="AdaptiveWeightedHinge: .*" + message):
        AdaptiveWeightedHinge(nn.Linear(2, 1).parameters()).backward(*arguments())


BAD_OPTIONS = {
    "alphas": ({"alpha1": 0.8}, "0 ≤ alpha1 ≤ alpha2 ≤ 1, got alpha1=0.8 and alpha2=0.75"),
    "delta": ({"delta": -0.1}, "delta must be finite and ≥ 0, got -0.1"),
    "epsilon": ({"epsilon": float("nan")}, "epsilon must be finite and ≥ 0, got nan"),
    "impl": ({"impl": "natve"}, "did you mean 'native'"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options(case):
    options, message = BAD_OPTIONS[case]
    with pytest.raises(ValueError, match=message):
        AdaptiveWeightedHinge([torch.ones(2)], **options)


def test_bad_parameters():
    layer = nn.Linear(2, 1)
    with pytest.raises(TypeError, match=r"pass discriminator.parameters\(\)"):
        AdaptiveWeightedHinge(layer)
    with pytest.raises(ValueError, match="parameters is empty"):
        AdaptiveWeightedHinge([])
    with pytest.raises(TypeError, match="must be tensors, got str"):
        AdaptiveWeightedHinge(["weight"])
    with pytest.raises(TypeError, match="must be float32.* got torch.complex64"):
        AdaptiveWeightedHinge([torch.ones(2, dtype=torch.complex64)])
    layer.requires_grad_(False)
    with pytest.raises(ValueError, match="all 2 parameters are frozen"):
        AdaptiveWeightedHinge(layer.parameters()).backward(logits(2), logits(2))


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), torch.ones(2), torch.ones((), device="meta")], ids=str)
def test_bad_scale(scale):
    layer = nn.Linear(2, 1)
    made = layer(torch.ones(3, 2))
    with pytest.raises(ValueError, match="AdaptiveWeightedHinge: .*scale.* must"):
        AdaptiveWeightedHinge(layer.parameters()).backward(made, made, scale=scale)


def test_dispatch_says_why():
    hinge = AdaptiveWeightedHinge([torch.ones(2)], impl="triton")
    with pytest.raises(ValueError, match=r'aw_hinge: has no implementation "triton" \(it has: native, reference\)'):
        dispatch.select("aw_hinge", hinge.impl, dispatch.Call(torch.device("cpu"), torch.float32))
    elsewhere = dispatch.explain("aw_hinge", dispatch.Call(torch.device("mps"), torch.float32))
    assert "no code for mps" in elsewhere and "reference  runs" in elsewhere
