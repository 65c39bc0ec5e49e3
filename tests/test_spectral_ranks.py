"""The spectral norm under DistributedDataParallel: one network on all ranks, that of one process on the whole batch."""

import numpy as np
import torch
from distributed_case import run_ranks
from spectral_case import draw
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastcifar.nn import SpectralNormGroup, spectral_norm


def _model():
    torch.manual_seed(2)
    layers = spectral_norm(nn.Conv2d(3, 4, 3)), nn.LeakyReLU(0.2), spectral_norm(nn.ConvTranspose2d(4, 2, 2))
    return nn.Sequential(*layers, nn.Flatten(), spectral_norm(nn.Linear(50, 1)))


def _train(model, wrapped, part):
    group = SpectralNormGroup(model)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        real, fake = (draw(4, 3, 6, 6, seed=2 * step + i)[part] for i in range(2))
        group.step()
        optimiser.zero_grad()
        # Two backward passes a step, each reduced over the ranks.
        torch.relu(1 - wrapped(real)).mean().backward()
        torch.relu(1 + wrapped(fake)).mean().backward()
        optimiser.step()
    return {key: value.numpy() for key, value in model.state_dict().items()}


def _rank(rank, world_size):
    model = _model()
    return _train(model, DistributedDataParallel(model), slice(2 * rank, 2 * rank + 2))


def test_two_ranks_equal_one():
    model = _model()
    expected = _train(model, model, slice(None))
    first, second = run_ranks(_rank, 2)
    assert first.keys() == second.keys() == expected.keys()
    for key, value in expected.items():
        assert np.array_equal(first[key], second[key]), key
        np.testing.assert_allclose(first[key], value, rtol=1e-5, atol=1e-6, err_msg=key)
