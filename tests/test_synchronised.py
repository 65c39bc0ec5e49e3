"""Statistics over several ranks, with batches of different sizes, equal one process on the whole batch."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from distributed_case import run_ranks

from fastcifar.functional import depthwise_conv_bn_act

SPLIT = (0, 3, 4)


def _operands():
    generator = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    x, weight = draw(4, 3, 5, 6) + 10, draw(3, 1, 3, 3)
    return x, weight, draw(3), draw(3), torch.zeros(3).double(), torch.ones(3).double(), draw(4, 3, 5, 6)


def _run(x, weight, gamma, beta, mean, var, gradient, group, impl):
    leaves = [t.clone().requires_grad_() for t in (x, weight, gamma, beta)]
    mean, var = mean.clone(), var.clone()
    out = depthwise_conv_bn_act(
        *leaves, mean, var, padding=1, activation="silu", training=True, process_group=group, impl=impl
    )
    out.backward(gradient)
    return [t.detach().numpy() for t in (out, leaves[0].grad, mean, var)], [t.grad.numpy() for t in leaves[1:]]


def _rank(rank, world_size, impl):
    x, weight, gamma, beta, mean, var, gradient = _operands()
    part = slice(SPLIT[rank], SPLIT[rank + 1])
    return _run(x[part], weight, gamma, beta, mean, var, gradient[part], dist.group.WORLD, impl)


@pytest.mark.parametrize("impl", ["reference"])
def test_two_ranks_equal_one(impl):
    tensors, parameter_gradients = _run(*_operands(), None, "reference")
    ranks = run_ranks(_rank, 2, impl)
    for i, name in enumerate(("output", "input gradient")):
        joined = np.concatenate([result[0][i] for result in ranks])
        np.testing.assert_allclose(joined, tensors[i], rtol=1e-10, atol=1e-11, err_msg=name)
    for i, name in ((2, "running_mean"), (3, "running_var")):
        for result in ranks:
            np.testing.assert_allclose(result[0][i], tensors[i], rtol=1e-12, err_msg=name)
    for i, name in enumerate(("weight", "bn_weight", "bn_bias")):
        total = sum(result[1][i] for result in ranks)
        np.testing.assert_allclose(total, parameter_gradients[i], rtol=1e-10, atol=1e-11, err_msg=name)
