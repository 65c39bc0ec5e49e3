"""The adaptive-weighted hinge's kernels on a GPU, small enough for compute-sanitizer."""

import pytest
import torch
from torch import nn

from fastcifar import native
from fastcifar.nn import AdaptiveWeightedHinge

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(native.cuda_obstacle()), reason=str(native.cuda_obstacle())),
]


def test_memcheck():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 1)).cuda()
    images = [torch.randn(n, 9).cuda() for n in (5, 4)]
    AdaptiveWeightedHinge(network.parameters(), impl="native").backward(*map(network, images))
    assert all(parameter.grad.cpu().isfinite().all() for parameter in network.parameters())
