"""The adaptive-weighted hinge over several ranks, with batches of different sizes, equals one process on the whole."""

import numpy as np
import torch
import torch.distributed as dist
from distributed_case import run_ranks
from torch import nn

from fastcifar.nn import AdaptiveWeightedHinge

REAL_SPLIT, FAKE_SPLIT = (0, 2, 5), (0, 5, 6)


class Network(nn.Module):
    """`gain` takes part in the first two real logits only, so that on the second rank it has no gradient."""

    def __init__(self, dtypes):
        super().__init__()
        torch.manual_seed(7)
        self.layers = nn.ModuleList([nn.Linear(4, 6).to(dtypes[0]), nn.Linear(6, 1).to(dtypes[1])])
        self.gain = nn.Parameter(torch.tensor([0.3], dtype=dtypes[1]))
        self.unused = nn.Parameter(torch.ones(2, dtype=dtypes[1]))

    def forward(self, images, gained=0):
        hidden = torch.tanh(self.layers[0](images.to(self.layers[0].weight.dtype)))
        logits = self.layers[1](hidden.to(self.layers[1].weight.dtype))
        return torch.cat([logits[:gained] * self.gain, logits[gained:]]) if gained else logits


def _steps(network, real, fake, gained, group, impl):
    hinge = AdaptiveWeightedHinge(network.parameters(), process_group=group, impl=impl)
    found = [[v.item() for v in hinge.backward(network(real, gained), network(fake))] for _ in range(2)]
    return found, [p.grad.double().numpy() for p in network.parameters() if p.grad is not None]


def _images():
    generator = torch.Generator().manual_seed(3)
    return (torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (REAL_SPLIT[-1], FAKE_SPLIT[-1]))


def _rank(rank, world_size, dtypes, impl):
    real, fake = _images()
    real, fake = real[REAL_SPLIT[rank] : REAL_SPLIT[rank + 1]], fake[FAKE_SPLIT[rank] : FAKE_SPLIT[rank + 1]]
    return _steps(Network(dtypes), real, fake, 2 if rank == 0 else 0, dist.group.WORLD, impl)


def test_two_ranks_equal_one():
    dtypes = (torch.float64, torch.float64)
    values, gradients = _steps(Network(dtypes), *_images(), 2, None, "reference")
    ranks = run_ranks(_rank, 2, dtypes, "auto")
    for found, parts in ranks:
        np.testing.assert_allclose(found, values, rtol=1e-12)
        # A parameter that no rank used has a gradient of zeros here, and none in one process.
        assert len(parts) == len(gradients) + 1
        assert sum(not part.any() for part in parts) == 1
        for part, whole in zip([part for part in parts if part.any()], gradients, strict=True):
            np.testing.assert_allclose(part, whole, rtol=1e-11, atol=1e-13)
    for ours, theirs in zip(ranks[0][1], ranks[1][1], strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_two_ranks_with_parameters_of_two_dtypes():
    dtypes = (torch.bfloat16, torch.float32)
    # One process in these dtypes is off by this much from float64; two ranks may be twice that and one rounding off.
    _, whole = _steps(Network(dtypes), *_images(), 2, None, "reference")
    _, exact = _steps(Network(dtypes).double(), *_images(), 2, None, "reference")
    ranks = run_ranks(_rank, 2, dtypes, "auto")
    for _, parts in ranks:
        for part, one, right in zip([part for part in parts if part.any()], whole, exact, strict=True):
            budget = 2 * np.abs(one - right).max() + 2**-8 * np.abs(right).max()
            assert np.abs(part - right).max() <= budget
    for ours, theirs in zip(ranks[0][1], ranks[1][1], strict=True):
        np.testing.assert_array_equal(ours, theirs)
