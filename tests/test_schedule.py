"""Learning-rate schedules against closed forms and torch's own."""

import math

import pytest
import torch

from fastcifar.training import schedule


def rates(name, steps, warmup):
    return [schedule.factor(name, step, steps, warmup) for step in range(steps)]


@pytest.mark.parametrize(("steps", "warmup"), [(100, 30), (57, 17), (10, 2)], ids=str)
def test_onecycle_is_torchs(steps, warmup):
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimiser = torch.optim.SGD([parameter], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=1.0, total_steps=steps, pct_start=warmup / steps, cycle_momentum=False
    )
    for ours in rates("onecycle", steps, warmup):
        assert ours == pytest.approx(optimiser.param_groups[0]["lr"], rel=1e-9)
        optimiser.step()
        if theirs.last_epoch < steps - 1:
            theirs.step()


@pytest.mark.parametrize("name", ["constant", "cosine", "linear", "onecycle"])
def test_shape(name):
    values = rates(name, 50, 10)
    assert max(values) == pytest.approx(1.0)
    assert all(0 < value <= 1 for value in values)
    assert values[:10] == sorted(values[:10])
    assert values[10:] == sorted(values[10:], reverse=True)


def test_linear_and_cosine_values():
    assert rates("linear", 4, 0) == [1.0, 0.75, 0.5, 0.25]
    assert rates("linear", 4, 2) == [0.5, 1.0, 1.0, 0.5]
    assert rates("cosine", 4, 0)[1] == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.25)))
    assert rates("constant", 3, 2) == [0.5, 1.0, 1.0]


def test_warm_up_of_the_whole_run_and_single_step():
    assert rates("linear", 4, 4) == [0.25, 0.5, 0.75, 1.0]
    assert rates("onecycle", 1, 0) == [1.0]
