"""batch_norm_act and BatchNormAct: definition, module behaviour, bad input."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastcifar import reference, validation
from fastcifar.functional import batch_norm_act
from fastcifar.nn import BatchNormAct, ConditionalBatchNormAct


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (2, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("with_residual", [True, False], ids=["residual", "plain"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("activation", validation.ACTIVATIONS)
def test_equals_the_separate_operations(shape, with_residual, training, activation):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    residual = torch.randn(shape, dtype=torch.float64) if with_residual else None
    weight, bias = torch.rand(3).double() + 0.5, torch.randn(3).double()
    mean, var = torch.randn(3).double(), torch.rand(3).double() + 0.5
    expected_mean, expected_var = mean.clone(), var.clone()
    y = F.batch_norm(x, expected_mean, expected_var, weight, bias, training, 0.2, 1e-3)
    expected = reference.activate(y + residual if with_residual else y, activation, 0.3)
    got = batch_norm_act(
        x,
        weight,
        bias,
        mean,
        var,
        residual,
        activation=activation,
        negative_slope=0.3,
        training=training,
        momentum=0.2,
        eps=1e-3,
        impl="reference",
    )
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mean, expected_mean)
    torch.testing.assert_close(var, expected_var)


def test_gradcheck_of_the_reference():
    torch.manual_seed(0)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 2, 4), (2,), (2,))]
    residual = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)

    def run(x, weight, bias, residual):
        return batch_norm_act(x, weight, bias, None, None, residual, activation="silu", training=True, impl="reference")

    assert torch.autograd.gradcheck(run, (*inputs, residual))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"affine": False},
        {"track_running_stats": False},
        {"momentum": None},
        {"eps": 1e-2, "momentum": 0.3},
    ],
    ids=str,
)
def test_module_equals_batch_norm_2d_over_several_steps(options):
    torch.manual_seed(0)
    ours, torchs = BatchNormAct(3, "relu", **options), nn.BatchNorm2d(3, **options)
    assert set(ours.state_dict()) == set(torchs.state_dict())
    for _ in range(3):
        x, residual = torch.randn(2, 2, 3, 4, 5)
        torch.testing.assert_close(ours(x, residual), F.relu(torchs(x) + residual))
    for key, value in torchs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value)
    ours.eval(), torchs.eval()
    torch.testing.assert_close(ours(x, residual), F.relu(torchs(x) + residual))
    torchs.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("conditional", [True, False], ids=["conditional", "plain"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_statistics_that_are_tracked_no_longer(conditional, momentum):
    """`nn.BatchNorm2d` leaves the statistics alone then, and still evaluates with them."""
    torch.manual_seed(0)
    ours = (
        ConditionalBatchNormAct(3, 2, "relu", momentum=momentum) if conditional else BatchNormAct(3, momentum=momentum)
    )
    torchs = nn.BatchNorm2d(3, momentum=momentum)
    labels = (torch.tensor([0, 1]),) if conditional else ()
    for step in range(3):
        x = torch.randn(2, 3, 4, 5)
        torch.testing.assert_close(ours(x, *labels), F.relu(torchs(x)))
        ours.track_running_stats = torchs.track_running_stats = step > 1
        for key in ("running_mean", "running_var", "num_batches_tracked"):
            torch.testing.assert_close(getattr(ours, key), getattr(torchs, key))
    ours.eval(), torchs.eval()
    ours.track_running_stats = torchs.track_running_stats = False
    torch.testing.assert_close(ours(x, *labels), F.relu(torchs(x)))


def test_autocast_gives_the_residual_the_dtype_of_x():
    module = BatchNormAct(3)
    x, residual = torch.randn(2, 3, 4, 4, dtype=torch.bfloat16), torch.randn(2, 3, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x, residual).dtype == torch.bfloat16
    with pytest.raises(TypeError, match="same dtype outside autocast"):
        module(x, residual)


BAD_CALLS = [
    ({"x": torch.zeros(4)}, ValueError, r"x must have shape \(N, C, …\), got \(4,\)"),
    ({"residual": torch.zeros(2, 3, 4)}, ValueError, "residual must have the shape of x"),
    ({"weight": torch.zeros(2)}, ValueError, r"weight must have shape \(3,\)"),
    ({"activation": "swish"}, ValueError, "unknown activation 'swish'"),
    ({"x": torch.zeros(1, 3)}, ValueError, "Expected more than 1 value per channel"),
    ({"training": False}, ValueError, "training=False needs running_mean"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_CALLS, ids=[m[:30] for *_, m in BAD_CALLS])
def test_bad_calls_name_the_values(change, error, message):
    arguments = {"x": torch.zeros(2, 3, 4, 4), "weight": None, "bias": None, "training": True, **change}
    with pytest.raises(error, match=message):
        batch_norm_act(**arguments)
