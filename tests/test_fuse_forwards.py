"""What forwards do beside calling layers, and users to a model: keep, count, share, overwrite, derive, transform."""

import copy

import pytest
import torch
import torch.nn.functional as F
from fuse_cases import CHANNELS, FORWARDS, Block, Forward, depthwise, sequence, several
from fuse_comparison import assert_fused_equals_original, image, make, record_operators
from torch import nn

from fastcifar.fuse import fuse

pytestmark = pytest.mark.usefixtures("one_thread")
MODULES = FORWARDS["modules"][0]


@pytest.fixture
def ran(monkeypatch):
    return record_operators(monkeypatch)


class Keeping(Forward):
    def __init__(self, function, **children):
        super().__init__(function, **children)
        self.feats, self.by_name = [], {}


OUTSIDE = []


def _attribute(m, x):
    m.feat = m.conv(x)
    return F.relu(m.bn(m.feat))


def _through_a_cycle(m, x):
    y = m.conv(x)

    def itself():
        return itself, y

    return F.relu(m.bn(y))


KEPT = {
    "attribute": (_attribute, lambda m: m.feat),
    "list": (lambda m, x: (m.feats.append(m.conv(x)), F.relu(m.bn(m.feats[-1])))[1], lambda m: m.feats[-1]),
    "dict": (
        lambda m, x: F.relu(m.bn(m.by_name.setdefault(len(m.by_name), m.conv(x)))),
        lambda m: m.by_name[len(m.by_name) - 1],
    ),
    "list elsewhere": (lambda m, x: (OUTSIDE.append(m.conv(x)), F.relu(m.bn(OUTSIDE[-1])))[1], lambda m: OUTSIDE[-1]),
}


@pytest.mark.parametrize("case", KEPT)
def test_what_a_forward_keeps_is_what_it_was(case):
    function, kept = KEPT[case]
    model = make(lambda: Keeping(function))
    report = assert_fused_equals_original(model, image())
    assert [entry.members for entry in report.fused] == [("bn", "relu()")]
    assert [entry.reason for entry in report.skipped] == ["Keeping.forward keeps its output"]
    fuse(model)
    x = image()
    model(x)
    torch.testing.assert_close(kept(model), model.conv(x))
    OUTSIDE.clear()


def test_what_a_forward_keeps_of_the_end_or_drops_is_fused():
    def keep_the_end(m, x):
        m.feat = m.relu(m.bn(m.conv(x)))
        return m.feat + 1

    for function in (keep_the_end, _through_a_cycle):
        (entry,) = fuse(Forward(function)).fused
        assert len(entry.members) == 3


def test_tracing_leaves_the_model_as_it_was():
    def count(m, x):
        m.count += 1
        m.plain += 1
        m.feats.append(m.conv(x))
        m.by_name["last"] = x
        return m.relu(m.bn(m.feats[-1]))

    model = Keeping(count)
    model.register_buffer("count", torch.zeros(1))
    model.plain = torch.zeros(1)
    assert fuse(model).fused
    assert model.count == model.plain == 0 and model.feats == [] and model.by_name == {}


def test_wrappers_are_not_called():
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *inputs, **options):
            raise AssertionError("called")

    inner = nn.Sequential(depthwise(), nn.BatchNorm2d(CHANNELS))
    assert [entry.members for entry in fuse(Wrapper(inner)).fused] == [("module.0", "module.1")]
    (entry,) = fuse(Wrapper(depthwise())).skipped
    assert entry.reason == "Wrapper.forward has no required argument"


def test_an_input_that_the_other_branch_overwrites(monkeypatch):
    """In evaluation dropout returns its input, which the branch changes before the addition."""
    ran = record_operators(monkeypatch, "batch_norm_act")
    function = lambda m, x: m.bn(m.conv(x)) + m.branch(x)  # noqa: E731
    branch = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(CHANNELS, CHANNELS, 1))
    model = make(lambda: Forward(function, conv=nn.Dropout(), branch=branch)).eval()
    twin = copy.deepcopy(model)
    assert [entry.members for entry in fuse(twin).fused] == [("bn",)]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(twin(image()), model(image()))
    assert ran == [("none", False)] * 2


def test_an_input_overwritten_since_its_layer_was_exchanged():
    branch = nn.ReLU(inplace=True)
    model = make(lambda: Forward(lambda m, x: m.bn(m.conv(x)) + m.branch(x), conv=nn.Conv2d(4, 4, 1), branch=branch))
    assert len(fuse(model).fused[0].members) == 2
    model.conv = nn.Identity()
    with pytest.raises(RuntimeError, match="the input of 'bn' was changed in place before the addition"):
        model(image())


def test_new_instances_of_fused_classes_are_plain(ran):
    model = make(Block).eval()
    twin = copy.deepcopy(model)
    fuse(twin)
    block = type(twin)().double().eval()
    assert type(block) is type(twin)
    block.load_state_dict(model.state_dict())
    twin.conv1 = type(twin.conv1)(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS, bias=False).double()
    twin.conv1.load_state_dict(model.conv1.state_dict())
    x = image(3)
    torch.testing.assert_close([block(x), twin(x)], [model(x)] * 2)
    torch.testing.assert_close(twin.conv1(image()), model.conv1(image()))
    assert ran == ["silu"]
    assert len(assert_fused_equals_original(block, x).fused) == 3


@pytest.mark.parametrize("member", ["conv", "bn"])
def test_members_that_another_module_calls_too(member, ran):
    owner = Forward(lambda m, x: m.relu(m.bn(m.conv(m.inner(x)))))
    children = {"norm" if member == "bn" else "conv": getattr(owner, member)}
    owner.inner = Forward(lambda m, x: getattr(m, member)(x) * 2, **children)
    report = assert_fused_equals_original(make(lambda: owner), image())
    reasons = [entry.reason for entry in report.skipped]
    assert f"Forward.forward calls {member!r} and a module that contains it" in reasons and not ran


def flattened(m, x):
    y = m.relu(m.bn(m.conv(x)) + x)
    return y.view(y.size(0), -1)


FORMATS = {
    "contiguous": lambda model, x: (model, x),
    "channels-last": lambda model, x: (model, x.to(memory_format=torch.channels_last)),
    "part of contiguous": lambda model, x: (model, torch.cat([x, x], 1).chunk(2, 1)[1]),
    "part of channels-last": lambda model, x: (
        model,
        torch.cat([x, x], 1).to(memory_format=torch.channels_last).chunk(2, 1)[1],
    ),
    "channels-last weights": lambda model, x: (model.to(memory_format=torch.channels_last), x),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_memory_formats_stay(kind):
    blocks = (sequence, lambda: Forward(MODULES), lambda: sequence(kernel_size=1, padding=0), lambda: nn.BatchNorm2d(4))
    for build in blocks:
        model = make(lambda b=build: nn.Sequential(b()), torch.float32)
        model, x = FORMATS[kind](model, image(dtype=torch.float32))
        twin = copy.deepcopy(model)
        assert fuse(twin).fused
        for training in (True, False):
            assert twin.train(training)(x).stride() == model.train(training)(x).stride()


def test_a_contiguous_model_can_be_flattened():
    for conv in (depthwise(), nn.Conv2d(CHANNELS, CHANNELS, 1)):
        model = make(lambda c=conv: Forward(flattened, conv=c), torch.float32)
        assert_fused_equals_original(model, image(dtype=torch.float32), 1e-4)


@pytest.mark.filterwarnings("ignore:.torch.jit.script")
def test_transforms_of_torch_func(ran):
    model = make(several, torch.float32).eval()
    twin = copy.deepcopy(model)
    fuse(twin)
    x = image(3, dtype=torch.float32)
    results = []
    for net in (model, twin):
        state = {name: parameter.detach() for name, parameter in net.named_parameters()}
        call = lambda s, y, n=net: torch.func.functional_call(n, s, (y,))  # noqa: E731
        gradients = torch.func.grad(lambda s, y, f=call: f(s, y).sum())(state, x)
        images = torch.func.vmap(call, (None, 0))(state, x[:, None])
        tangents = torch.func.jvp(lambda y, f=call, s=state: f(s, y), (x,), (x,))
        results.append((gradients, images, tangents))
    torch.testing.assert_close(results[1], results[0])
    assert not ran


class Registered(Forward):
    def __init_subclass__(cls, *, register, **options):
        super().__init_subclass__(**options)


def test_a_class_that_cannot_be_derived_from_is_left_alone(ran):
    class RegisteredSequence(nn.Sequential):
        def __init_subclass__(cls, *, register, **options):
            super().__init_subclass__(**options)

    layers = RegisteredSequence(*sequence())
    model = make(lambda: nn.Sequential(Forward(MODULES), Registered(MODULES), layers, *sequence()))
    classes = [type(module) for part in model[1:3] for module in part.modules()]
    report = assert_fused_equals_original(model, image())
    assert [entry.path for entry in report.fused] == ["0.conv", "3"] and len(ran) == 6
    reasons = {entry.path: entry.reason for entry in report.skipped}
    assert list(reasons) == ["1.conv", "2.0"]
    assert reasons["1.conv"].startswith("no class can be derived from Registered: ") and "register" in reasons["2.0"]
    fuse(model)
    assert [type(module) for part in model[1:3] for module in part.modules()] == classes


def test_compiles_with_sizes_that_change():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4, bias=False), nn.BatchNorm2d(4), nn.LeakyReLU(0.1))
    fused = copy.deepcopy(model)
    fuse(fused)
    compiled = torch.compile(fused, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in (6, 9):
        x = torch.randn(2, 4, size, size + 1)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
