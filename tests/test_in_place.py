"""What operators return belongs to the caller, who may change it in place."""

import pytest
import torch
from torch import nn

from fastcifar.nn import BatchNormAct, DepthwiseConvBNAct


@pytest.mark.parametrize("impl", ["native", "triton"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "layer",
    [
        lambda impl: BatchNormAct(6, activation="silu", impl=impl),
        lambda impl: DepthwiseConvBNAct(6, 3, padding=1, activation="silu", impl=impl),
        lambda impl: DepthwiseConvBNAct(6, 3, stride=2, padding=1, impl=impl),
    ],
    ids=["batch norm", "depthwise", "depthwise, stride 2"],
)
def test_a_result_may_be_added_to_in_place(layer, training, impl):
    torch.manual_seed(0)
    made = layer(impl).train(training)
    first = nn.Conv2d(3, 6, 1)
    x = torch.randn(2, 3, 5, 7)

    def gradients(add):
        made.zero_grad()
        z = made(first(x))
        torch.manual_seed(1)
        z = add(z, torch.randn_like(z))
        (z * torch.randn_like(z)).sum().backward()
        return [parameter.grad.clone() for parameter in made.parameters()]

    for found, expected in zip(gradients(torch.Tensor.add_), gradients(torch.Tensor.add), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
