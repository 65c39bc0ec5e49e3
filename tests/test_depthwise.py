"""depthwise_conv_bn_act and DepthwiseConvBNAct: definition, module behaviour, bad input, dispatch."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastcifar import dispatch
from fastcifar.functional import depthwise_conv_bn_act
from fastcifar.nn import DepthwiseConvBNAct

TORCH_ACTIVATIONS = {
    "none": nn.Identity(),
    "relu": nn.ReLU(),
    "relu6": nn.ReLU6(),
    "leaky_relu": nn.LeakyReLU(0.2),
    "silu": nn.SiLU(),
    "hardswish": nn.Hardswish(),
}


def operands(channels=5, kernel=3, size=(3, 7, 9), dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    n, h, w = size
    return {
        "x": draw(n, channels, h, w),
        "weight": draw(channels, 1, kernel, kernel),
        "bn_weight": draw(channels).abs() + 0.5,
        "bn_bias": draw(channels),
        "running_mean": draw(channels),
        "running_var": draw(channels).abs() + 0.5,
    }


@pytest.mark.parametrize("activation", TORCH_ACTIVATIONS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_equals_the_separate_modules(activation, training):
    tensors = operands()
    conv = nn.Conv2d(5, 5, 3, 2, 1, groups=5, bias=False).double()
    norm = nn.BatchNorm2d(5).double().train(training)
    with torch.no_grad():
        conv.weight.copy_(tensors["weight"])
        norm.weight.copy_(tensors["bn_weight"])
        norm.bias.copy_(tensors["bn_bias"])
        norm.running_mean.copy_(tensors["running_mean"])
        norm.running_var.copy_(tensors["running_var"])
    expected = TORCH_ACTIVATIONS[activation](norm(conv(tensors["x"])))
    got = depthwise_conv_bn_act(
        **tensors, stride=2, padding=1, activation=activation, negative_slope=0.2, training=training, impl="reference"
    )
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(tensors["running_mean"], norm.running_mean)
    torch.testing.assert_close(tensors["running_var"], norm.running_var)


@pytest.mark.parametrize("activation", ["none", "leaky_relu", "silu"])
def test_gradcheck_of_the_reference(activation):
    tensors = operands(channels=2, size=(2, 4, 5))
    inputs = [tensors[key].requires_grad_() for key in ("x", "weight", "bn_weight", "bn_bias")]

    def run(*args):
        return depthwise_conv_bn_act(*args, padding=1, activation=activation, training=True, impl="reference")

    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_reference_runs_in_every_dtype(dtype):
    tensors = operands(dtype=dtype)
    out = depthwise_conv_bn_act(**tensors, padding=1, training=True, impl="reference")
    assert out.dtype == dtype and out.isfinite().all()


@pytest.mark.parametrize("options", [{"stride": (2, 1)}, {"padding": (0, 2)}, {"dilation": (1, 2)}], ids=str)
def test_pairs_of_options(options):
    tensors = operands()
    got = depthwise_conv_bn_act(**tensors, activation="none", impl="reference", **options)
    y = F.conv2d(tensors["x"], tensors["weight"], None, groups=5, **options)
    expected = F.batch_norm(
        y, tensors["running_mean"], tensors["running_var"], tensors["bn_weight"], tensors["bn_bias"]
    )
    torch.testing.assert_close(got, expected)


def test_autocast_casts_x_and_the_convolution_weight_only():
    tensors = operands(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = depthwise_conv_bn_act(**tensors, padding=1, training=True)
    assert out.dtype == torch.bfloat16
    assert tensors["running_mean"].dtype == torch.float32


def test_module_state_and_initial_values_match_torch():
    torch.manual_seed(3)
    module = DepthwiseConvBNAct(6, 5, stride=2)
    torch.manual_seed(3)
    conv, norm = nn.Conv2d(6, 6, 5, 2, 2, groups=6, bias=False), nn.BatchNorm2d(6)
    assert torch.equal(module.weight, conv.weight)
    keys = {"weight", "bn_weight", "bn_bias", "running_mean", "running_var", "num_batches_tracked"}
    assert set(module.state_dict()) == keys
    x = torch.randn(4, 6, 9, 9)
    for _ in range(3):
        torch.testing.assert_close(module(x), F.relu(norm(conv(x))))
    torch.testing.assert_close(module.running_var, norm.running_var)
    assert module.num_batches_tracked == norm.num_batches_tracked == 3
    module.eval(), norm.eval()
    torch.testing.assert_close(module(x), F.relu(norm(conv(x))))
    assert module.num_batches_tracked == 3


def test_momentum_none_is_the_cumulative_average():
    torch.manual_seed(0)
    module = DepthwiseConvBNAct(3, momentum=None, activation="none")
    norm = nn.BatchNorm2d(3, momentum=None)
    for _ in range(4):
        x = torch.randn(2, 3, 5, 5)
        module(x)
        norm(F.conv2d(x, module.weight, None, 1, 1, 1, 3))
    torch.testing.assert_close(module.running_mean, norm.running_mean)
    torch.testing.assert_close(module.running_var, norm.running_var)


def test_deepcopy_trains_apart():
    module = DepthwiseConvBNAct(3)
    twin = copy.deepcopy(module)
    module(torch.randn(2, 3, 4, 4))
    assert not torch.equal(module.running_mean, twin.running_mean)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compiles_without_graph_break(training):
    torch.manual_seed(0)
    module = DepthwiseConvBNAct(3, activation="silu").train(training)
    x = torch.randn(2, 3, 6, 6)
    expected = copy.deepcopy(module)(x)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)


BAD_CALLS = [
    ({"x": torch.zeros(2, 5, 7)}, ValueError, r"x must have shape \(N, C, H, W\), got \(2, 5, 7\)"),
    ({"x": torch.zeros(2, 5, 7, 7, dtype=torch.int64)}, TypeError, "x must be floating point, got torch.int64"),
    ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
    (
        {"weight": torch.zeros(4, 1, 3, 3, dtype=torch.float64)},
        ValueError,
        r"weight must have shape \(5, 1, K, K\) for an input of 5 channels, got \(4, 1, 3, 3\)",
    ),
    ({"weight": torch.zeros(5, 1, 3, 3)}, TypeError, "same dtype outside autocast"),
    ({"weight": torch.zeros(5, 1, 9, 9, dtype=torch.float64)}, ValueError, "does not fit an input of"),
    ({"bn_weight": torch.zeros(4)}, ValueError, r"bn_weight must have shape \(5,\)"),
    ({"bn_bias": torch.zeros(5, dtype=torch.int32)}, TypeError, "bn_bias must be floating point"),
    ({"running_mean": None}, ValueError, "running_mean is None"),
    ({"running_mean": None, "running_var": None}, ValueError, "training=False needs running_mean"),
    ({"stride": 0}, ValueError, "stride must be an int or a pair of ints, each ≥ 1, got 0"),
    ({"padding": -1}, ValueError, "padding must be"),
    ({"dilation": 1.5}, ValueError, "dilation must be"),
    ({"activation": "rleu"}, ValueError, "did you mean 'relu'"),
    ({"impl": "tritn"}, ValueError, "did you mean 'triton'"),
    ({"momentum": 1.5}, ValueError, r"momentum must lie in \[0, 1\], got 1.5"),
    ({"eps": 0.0}, ValueError, "eps must be > 0"),
    ({"negative_slope": float("nan")}, ValueError, "negative_slope must be finite"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_CALLS, ids=[m[:40] for *_, m in BAD_CALLS])
def test_bad_calls_name_the_values(change, error, message):
    with pytest.raises(error, match=message):
        depthwise_conv_bn_act(**{**operands(), **change})


def test_single_value_per_channel_raises_as_torch_does():
    tensors = operands(size=(1, 3, 3))
    with pytest.raises(ValueError) as ours:
        depthwise_conv_bn_act(**tensors, training=True)
    with pytest.raises(ValueError) as torchs:
        F.batch_norm(torch.zeros(1, 5, 1, 1), None, None, training=True)
    assert str(ours.value).replace("torch.Size(", "").rstrip(")") == str(torchs.value).replace(
        "torch.Size(", ""
    ).rstrip(")")


def test_module_refuses_bad_options():
    with pytest.raises(ValueError, match="even kernel_size"):
        DepthwiseConvBNAct(3, 4)
    with pytest.raises(ValueError, match="≥ 1, got 0"):
        DepthwiseConvBNAct(0)
    with pytest.raises(ValueError, match="unknown activation"):
        DepthwiseConvBNAct(3, activation="gelu")


def test_explain_names_the_running_implementation():
    text = dispatch.explain("depthwise_conv_bn_act")
    assert text.count(" runs") == 1 and "reference" in text
    with pytest.raises(ValueError, match="unknown operator 'matmul'"):
        dispatch.explain("matmul")
