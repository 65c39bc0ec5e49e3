"""fuse(): what it takes and why it leaves the rest; outputs, gradients and buffers are those of the original."""

import copy
from collections import Counter
from functools import partial

import fuse_cases
import pytest
import torch
import torch.nn.functional as F
from fuse_cases import CHANNELS, FORWARDS, RESIDUALS, SEQUENCES, SKIPPED, Block, Forward, depthwise, sequence
from fuse_comparison import assert_fused_equals_original, image, make, observe, record_operators
from torch import nn

from fastcifar import dispatch, native
from fastcifar.fuse import fuse, unfuse

pytestmark = pytest.mark.usefixtures("one_thread")
NORM = partial(nn.BatchNorm2d, CHANNELS)
# dtype and tolerance by implementation
IMPLEMENTATIONS = {"reference": (torch.float64, 1e-12), "native": (torch.float32, 1e-4)}


@pytest.fixture(params=IMPLEMENTATIONS)
def impl(request):
    call = dispatch.Call(torch.device("cpu"), IMPLEMENTATIONS[request.param][0], (3, 3))
    for implementation in dispatch.implementations("depthwise_conv_bn_act"):
        if implementation.name == request.param and implementation.obstacle(call) is not None:
            pytest.skip(implementation.obstacle(call))
    return request.param


@pytest.fixture
def ran(monkeypatch):
    return record_operators(monkeypatch)


@pytest.mark.parametrize("case", SEQUENCES)
def test_sequences(case, impl, ran):
    build, activation = SEQUENCES[case]
    dtype, tolerance = IMPLEMENTATIONS[impl]
    report = assert_fused_equals_original(make(build, dtype), image(dtype=dtype), tolerance, impl=impl)
    assert [entry.activation for entry in report.fused] == [activation] and not report.skipped
    assert ran == [activation] * 3


@pytest.mark.parametrize("case", FORWARDS)
def test_forwards(case, impl, ran):
    function, activation, last = FORWARDS[case]
    dtype, tolerance = IMPLEMENTATIONS[impl]
    model = make(lambda: Forward(function), dtype)
    report = assert_fused_equals_original(model, image(dtype=dtype), tolerance, impl=impl)
    assert [(entry.activation, entry.members[-1]) for entry in report.fused] == [(activation, last)]
    assert not report.skipped and ran == [activation] * 3


@pytest.mark.parametrize("case", RESIDUALS)
def test_batch_norm_residual_and_activation(case, monkeypatch):
    impl = "reference"  # in float64: some of these are about dtypes
    function, members, activation, adds = RESIDUALS[case]
    dtype, tolerance = IMPLEMENTATIONS[impl]
    ran = record_operators(monkeypatch, "batch_norm_act")
    pointwise = {"conv": nn.Conv2d(CHANNELS, CHANNELS, 1), "conv2": nn.Conv2d(CHANNELS, CHANNELS, 1)}
    model = make(lambda: Forward(function, **pointwise), dtype)
    twin = copy.deepcopy(model)
    report = assert_fused_equals_original(model, image(dtype=dtype), tolerance, impl=impl)
    assert [entry.members for entry in report.fused] == [members] and not report.skipped
    assert ran == [(activation, adds)] * 3
    assert not fuse(twin, batch_norm=False).fused and unfuse(twin) == 0


def test_residual_blocks(monkeypatch):
    impl = "reference"
    dtype, tolerance = IMPLEMENTATIONS[impl]
    ran = record_operators(monkeypatch, "batch_norm_act")
    model = make(lambda: nn.Sequential(fuse_cases.BasicBlock(3, 4), fuse_cases.BasicBlock(4, 4)), dtype)
    report = assert_fused_equals_original(model, image(3, dtype=dtype), tolerance, impl=impl)
    assert [entry.members for entry in report.fused] == [
        ("0.bn1", "0.relu"),
        ("0.bn2", "add()", "0.relu"),
        ("0.downsample.1",),
        ("1.bn1", "1.relu"),
        ("1.bn2", "add()", "1.relu"),
    ]
    assert ran == [("relu", False), ("none", False), ("relu", True), ("relu", False), ("relu", True)] * 3


@pytest.mark.parametrize("build", [fuse_cases.TwoSharingAnActivation, lambda: fuse_cases.Residual(*sequence())])
def test_shared_activations_lists_and_residuals(build, impl, ran):
    dtype, tolerance = IMPLEMENTATIONS[impl]
    report = assert_fused_equals_original(make(build, dtype), image(dtype=dtype), tolerance, impl=impl)
    assert not report.skipped and len(ran) == 3 * len(report.fused)


def test_across_nested_sequences(ran):
    """Nobody but the forward can tell what follows the last of a Sequential."""
    first = nn.Sequential(nn.ReLU(), depthwise())
    forward = Forward(lambda m, x: F.relu(m.bn(m.first(x))), conv=nn.Identity(), first=first)
    nested = nn.Sequential(nn.Sequential(depthwise()), nn.Sequential(nn.BatchNorm2d(CHANNELS), nn.ReLU()))
    for model, members in ((forward, ("first.1", "bn", "relu()")), (nested, ("0.0", "1.0", "1.1"))):
        report = assert_fused_equals_original(make(lambda m=model: m), image())
        assert [entry.members for entry in report.fused] == [members]
        twin = copy.deepcopy(model)
        fuse(twin)
        twin.get_submodule(members[0].split(".")[0]).register_forward_hook(lambda *_: ran.append("hook"))
        ran.clear()
        torch.testing.assert_close(twin(image()), model(image()))
        assert ran == ["hook"]


END_OF_SEQUENCE = {
    "goes on in forward": (lambda m, x: m.relu(m.inner(x)), (depthwise, NORM), ("inner.0", "inner.1", "relu")),
    "ends there": (lambda m, x: m.inner(x) * 2, (depthwise, NORM), ("inner.0", "inner.1")),
    "forward not traceable": (fuse_cases.only_positive, (depthwise, NORM), ("inner.0", "inner.1")),
    "began in forward": (lambda m, x: m.inner(m.conv(x)), (NORM, nn.ReLU), ("conv", "inner.0", "inner.1")),
    "sum of its output": (lambda m, x: m.relu(m.inner(x) + x), (nn.ReLU, NORM), ("inner.1", "add()", "relu")),
}


@pytest.mark.parametrize("case", END_OF_SEQUENCE)
def test_groups_over_the_ends_of_a_sequence(case):
    function, layers, members = END_OF_SEQUENCE[case]
    conv = depthwise() if case == "began in forward" else nn.Identity()
    model = make(lambda: Forward(function, conv=conv, norm=nn.Identity(), inner=nn.Sequential(*(f() for f in layers))))
    assert [entry.members for entry in assert_fused_equals_original(model, image()).fused] == [members]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", SKIPPED)
def test_reasons_for_not_fusing(case, ran):
    build, reason = SKIPPED[case]
    torch.manual_seed(0)
    model = build()
    classes = [type(module) for module in model.modules()]
    report = fuse(model, batch_norm=False)
    assert not report.fused
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError("; ".join(entry.reason for entry in report.skipped))
    assert [type(module) for module in model.modules()] == classes


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_reason_quantised():
    quantised = pytest.importorskip("torch.ao.nn.quantized", reason="this torch has no quantised modules")
    (entry,) = fuse(nn.Sequential(quantised.Conv2d(4, 4, 3, groups=4), nn.ReLU())).skipped
    assert "has a forward other than that of nn.Conv2d" in entry.reason


def test_reason_forward_of_the_instance():
    model = Forward(FORWARDS["modules"][0])
    model.forward = lambda x: model.bn(model.conv(x)) * 2
    assert "forward of its own on the instance" in fuse(model).skipped[0].reason


def test_report_reads_as_a_table():
    model = nn.Sequential(Block(), sequence(bias=True), nn.Conv2d(3, 3, 1))
    report = fuse(model)
    lines = str(report).splitlines()
    assert lines[0] == 'Sequential: 4 fused, 1 not, 3 other convolutions; impl="auto"' == repr(report)[1:-1]
    assert [line.split() for line in lines[2:6]] == [
        ["fused", "0.expand.1", "2", "relu6"],
        ["fused", "0.conv1", "bn1", "+", "hardswish()", "hardswish"],
        ["fused", "0.inner.0", "1", "+", "2", "silu"],
        ["fused", "1.1", "2", "relu"],
    ]
    assert lines[6].split(maxsplit=3)[2:] == ["1.0", "the convolution has a bias"]
    assert str(fuse(nn.Linear(1, 1))) == 'Linear: 0 fused, 0 not, 0 other convolutions; impl="auto"'


def test_bad_arguments():
    with pytest.raises(TypeError, match="fuse: model must be a torch.nn.Module, got list"):
        fuse([nn.ReLU()])
    with pytest.raises(TypeError, match="unfuse: model must be a torch.nn.Module, got NoneType"):
        unfuse(None)
    with pytest.raises(ValueError, match="did you mean 'reference'"):
        fuse(nn.ReLU(), impl="referense")


# groups that run depthwise_conv_bn_act, batch_norm_act, and those of the latter that add a residual
TORCHVISION = {
    "mobilenet_v2": (17, 35, 10),
    "mobilenet_v3_large": (15, 31, 10),
    "efficientnet_b0": (16, 33, 0),
    "mnasnet1_0": (17, 35, 10),
    "shufflenet_v2_x1_0": (19, 37, 0),
    "resnet18": (0, 20, 8),
}


@pytest.fixture
def torchvision_models():
    try:
        from torchvision import models
    except Exception as error:
        pytest.skip(f"torchvision cannot be imported here: {error}")
    return models


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_models(name, torchvision_models):
    dtype, tolerance = IMPLEMENTATIONS["reference"]
    model = make(lambda: getattr(torchvision_models, name)(num_classes=10), dtype)
    report = assert_fused_equals_original(model, image(3, 38, dtype), tolerance, steps=1, impl="reference")
    operators = Counter(entry.operator for entry in report.fused)
    residuals = sum("add()" in entry.members for entry in report.fused)
    assert (operators["depthwise_conv_bn_act"], operators["batch_norm_act"], residuals) == TORCHVISION[name]
    assert not report.skipped


def assert_as_near_to_float64(model, x, impl):
    """Fused in float32, a step is as near to the float64 original as four times the float32 original is.

    In 50 layers errors grow, and a rounding that puts a value on the other side of a kink changes a gradient for good:
    the inputs are such that none does.
    """
    exact = observe(copy.deepcopy(model), x, steps=1)
    plain = observe(copy.deepcopy(model).float(), x.float(), steps=1)
    twin = copy.deepcopy(model).float()
    fuse(twin, impl=impl)
    fused = observe(twin, x.float(), steps=1)
    assert list(fused) == list(exact)
    for kind in ("output", "input gradient", "gradient", "buffer", "evaluation"):
        names = [name for name in exact if name.startswith(kind) and exact[name].is_floating_point()]
        target, near, ours = (torch.cat([d[n].double().flatten() for n in names]) for d in (exact, plain, fused))
        assert (ours - target).norm() <= 4 * (near - target).norm() + 1e-6 * target.norm(), kind


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_models_on_the_compiled_core(name, torchvision_models):
    if native.module() is None:
        pytest.skip(native.why_not())
    model = make(lambda: getattr(torchvision_models, name)(num_classes=10))
    assert_as_near_to_float64(model, image(3, 38, seed=2), "native")


def test_torchvision_model_on_triton(torchvision_models, monkeypatch):
    """Large programs: the interpreter pays by the operation."""
    configs = pytest.importorskip("fastcifar.kernels.triton.configs")

    def large(operation, *call):
        return configs.Tile(1, 256, 64, 32, 4) if operation.startswith("bn_") else configs.Tile(1, 64, 32, 32, 4)

    monkeypatch.setattr(configs, "tile", large)
    # The first half: dense and depthwise convolutions of 3×3 and 5×5, both strides, ReLU, Hardswish, residuals.
    model = make(lambda: torchvision_models.mobilenet_v3_small(width_mult=0.25).features[:6])
    assert_as_near_to_float64(model, image(3, 38), "triton")
