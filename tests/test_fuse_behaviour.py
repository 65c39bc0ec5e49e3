"""A fused model is the original to its users: hooks, copies, checkpoints, threads, modes, later changes."""

import copy
import pickle
import threading

import fuse_cases
import pytest
import torch
from fuse_cases import CHANNELS, FORWARDS, BasicBlock, Block, Forward, sequence, several
from fuse_comparison import (
    assert_alike,
    assert_fused_equals_original,
    image,
    make,
    observe,
    record_operators,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastcifar.fuse import fuse, unfuse

pytestmark = pytest.mark.usefixtures("one_thread")
MODULES = FORWARDS["modules"][0]


@pytest.fixture
def ran(monkeypatch):
    return record_operators(monkeypatch)


@pytest.mark.parametrize("before", [True, False], ids=["hooked then fused", "fused then hooked"])
@pytest.mark.parametrize(("name", "expected"), [("conv", []), ("bn", []), ("relu", ["none"])])
def test_hooks_see_what_they_saw(name, expected, before, ran):
    model = make(lambda: Forward(MODULES, relu=nn.ReLU()))
    twin = copy.deepcopy(model)
    seen = []
    if not before:
        assert len(fuse(twin, batch_norm=False).fused) == 1
    for net in (model, twin):
        hooked = getattr(net, name)
        hooked.register_forward_hook(lambda module, args, output: seen.append(output.detach().clone()))
        hooked.register_full_backward_hook(lambda module, gradient_input, gradient: seen.append(gradient[0].clone()))
    if before:
        report = fuse(twin, batch_norm=False)
        assert len(report.fused) == len(expected)
        assert expected or f"hooks on the {type(getattr(model, name)).__name__}" in report.skipped[0].reason
    model(image().requires_grad_()).square().sum().backward()
    assert not ran
    twin(image().requires_grad_()).square().sum().backward()
    assert ran == expected and len(seen) == 4
    torch.testing.assert_close(seen[2:], seen[:2])


@pytest.mark.parametrize(("name", "expected"), [("bn2", None), ("relu", ("none", True)), ("conv2", ("relu", True))])
def test_hooks_on_a_residual_block(name, expected, monkeypatch):
    ran = record_operators(monkeypatch, "batch_norm_act")
    model = make(lambda: BasicBlock(CHANNELS, CHANNELS))
    twin = copy.deepcopy(model)
    fuse(twin)
    seen = []
    for net in (model, twin):
        net.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append(output.clone()))
        net(image()).sum().backward()
    torch.testing.assert_close(seen[len(seen) // 2 :], seen[: len(seen) // 2])
    torch.testing.assert_close([p.grad for p in twin.parameters()], [p.grad for p in model.parameters()])
    assert ran[1:] == ([] if expected is None else [expected])


def test_global_hooks_see_every_module(ran):
    model = make(Block)
    fuse(model)
    called = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: called.append(type(module)))
    try:
        model(image(3))
    finally:
        handle.remove()
    assert len(called) == 12 and not ran


def test_modules_called_on_their_own_are_themselves(ran):
    model = make(lambda: nn.Sequential(Forward(MODULES), *sequence()))
    twin = copy.deepcopy(model)
    assert len(fuse(twin).fused) == 2
    x = image()
    for path in ("0.conv", "0.bn", "0.relu", "1", "2", "3"):
        torch.testing.assert_close(twin.get_submodule(path)(x.clone()), model.get_submodule(path)(x.clone()))
    torch.testing.assert_close(dict(twin.named_buffers()), dict(model.named_buffers()))
    torch.testing.assert_close(twin[0].conv(input=x), model[0].conv(x))
    assert not ran
    torch.testing.assert_close(twin[1:3](x), model[1:3](x))


def test_changes_after_fusing_are_followed(ran):
    def change(model):
        model[0].bn = make(lambda: nn.BatchNorm2d(CHANNELS), seed=2)
        model[1][2] = nn.GELU()
        model[2].insert(1, nn.Dropout(0.0))
        model[3][1].momentum, model[3][1].eps = 0.7, 0.01
        model[4][0].bias = nn.Parameter(torch.ones(CHANNELS, dtype=torch.float64))
        return model

    model = make(lambda: nn.Sequential(Forward(MODULES), sequence(), sequence(), sequence(), sequence()))
    twin = copy.deepcopy(model)
    assert len(fuse(twin).fused) == 5
    assert_alike(observe(change(model), image()), observe(change(twin), image()))
    assert ran[:2] == ["none", "relu"] and len(ran) == 6


def test_changed_dataflow_is_an_error():
    model = make(lambda: Forward(FORWARDS["F.silu"][0]))
    fuse(model)
    model(image())
    model.function = lambda m, x: m.conv(x)
    with pytest.raises(RuntimeError, match=r"the output of 'conv' did not go through all that followed it in fuse\(\)"):
        model(image())
    model.function = lambda m, x: torch.tanh(m.bn(m.conv(x)))
    with pytest.raises(RuntimeError, match="did not go through"):
        model(image())
    unfuse(model)
    model(image())


def test_addition_that_does_not_come_is_an_error():
    model = make(lambda: Forward(lambda m, x: m.relu(m.bn(m.conv(x)) + x), conv=nn.Conv2d(CHANNELS, CHANNELS, 1)))
    fuse(model)
    model(image())
    model.function = lambda m, x: m.relu(m.bn(m.conv(x)))
    with pytest.raises(RuntimeError, match="the output of 'bn' did not go through"):
        model(image())


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_blocks(reentrant, ran):
    """Activation checkpointing of whole blocks runs their forward, and so the operators, twice."""
    results = []
    for fused in (False, True):
        model = make(several).train()
        assert not fused or len(fuse(model).fused) == 6
        x = image(3).requires_grad_()
        y = x
        for block in model:
            y = checkpoint(block, y, use_reentrant=reentrant)
        y.square().sum().backward()
        results.append((y, x.grad, [p.grad for p in model.parameters()], list(model.buffers())))
    torch.testing.assert_close(results[1], results[0])
    assert len(ran) == 10


def test_only_the_traced_form_of_a_call_is_fused(ran):
    model = make(lambda: fuse_cases.Optional(None))
    twin = copy.deepcopy(model)
    fuse(twin)
    x = image()
    for args, kwargs, expected in (((x,), {}, 1), ((), {"x": x}, 1), ((x, x), {}, 0), ((x,), {"residual": x}, 0)):
        ran.clear()
        torch.testing.assert_close(twin(*args, **kwargs), model(*args, **kwargs))
        assert len(ran) == expected


def test_a_forward_that_counts_is_traced_without_counting():
    def count(m, x):
        m.seen = getattr(m, "seen", 0) + 1
        torch.rand(1)
        return m.bn(m.conv(x))

    model = Forward(count)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert fuse(model).fused and not hasattr(model, "seen")
    assert torch.equal(torch.get_rng_state(), state)
    model(image().float())
    assert model.seen == 1


def test_frozen_parameters_and_modes():
    model = make(Block).train()
    model.bn1.eval()
    model.conv1.weight.requires_grad_(False)
    model.inner[1].weight.requires_grad_(False)
    model.inner[1].eval()
    assert len(assert_fused_equals_original(model, image(3)).fused) == 3
    model.requires_grad_(False)
    assert_fused_equals_original(model, image(3))


def test_state_dict_both_ways_and_exact_unfuse(ran):
    original, fused = make(Block), make(Block, seed=1)
    fuse(fused)
    fused(image(3))
    original.load_state_dict(fused.state_dict())
    torch.testing.assert_close(original(image(3)), fused(image(3)))
    other = make(Block, seed=2)
    fused.load_state_dict(other.state_dict())
    torch.testing.assert_close(other(image(3)), fused(image(3)))
    own = [(type(module), set(module.__dict__)) for module in other.modules()]
    assert unfuse(fused) == 5
    assert [(type(module), set(module.__dict__)) for module in fused.modules()] == own
    assert unfuse(fused) == 0
    ran.clear()
    torch.testing.assert_close(other(image(3)), fused(image(3)))
    assert not ran


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_duplicates_are_fused_and_apart(duplicate, ran):
    model = make(several)
    fuse(model)
    twin = duplicate(model)
    assert_alike(observe(model, image(3)), observe(twin, image(3)))
    assert len(ran) == 5 * 6
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    assert unfuse(twin) == 13 and twin[0].conv1.weight is not model[0].conv1.weight
    model(image(3))
    assert len(ran) == 5 * 7


def test_fusing_again_starts_from_the_original(ran):
    model = make(Block)
    twin = copy.deepcopy(model)
    assert [fuse(twin) for _ in range(3)][0].fused == fuse(twin, impl="reference").fused
    assert_alike(observe(model, image(3)), observe(twin, image(3)))
    assert len(ran) == 6 and unfuse(twin) == 5


def test_shared_modules(ran):
    """One group in two sequences, one convolution and norm in two forwards."""
    group, owner = sequence(), Forward(MODULES)
    second = Forward(FORWARDS["F.relu"][0], conv=owner.conv, norm=owner.bn)
    model = make(lambda: nn.Sequential(group, nn.Sequential(*group), owner, second, group))
    report = assert_fused_equals_original(model, image())
    assert len(report.fused) == 4 and len(ran) == 15


@pytest.mark.parametrize("normalise", ["weight_norm", "spectral_norm"])
def test_parametrised_weights_are_left_alone(normalise, ran):
    model = make(Block)
    getattr(nn.utils.parametrizations, normalise)(model.conv1)
    report = assert_fused_equals_original(model, image(3))
    assert [entry.reason for entry in report.skipped] == ["the ParametrizedConv2d is parametrised"]
    assert ran == ["silu"] * 3


def test_parametrised_after_fusing(ran):
    model = make(Block)
    fuse(model)
    nn.utils.parametrizations.weight_norm(model.conv1)
    model(image(3))
    assert ran == ["silu"]
    with pytest.raises(ValueError, match="unfuse: ParametrizedFused.* remove the parametrisation"):
        unfuse(model)
    nn.utils.parametrize.remove_parametrizations(model.conv1, "weight")
    assert unfuse(model) == 5


def test_threads_share_a_model(ran):
    model = make(several).eval()
    inputs = [image(3, seed=seed) for seed in range(4)]
    expected = [model(x) for x in inputs]
    fuse(model)
    wrong = []

    def work(x, y):
        for _ in range(20):
            if not torch.allclose(model(x), y, rtol=1e-12):
                wrong.append(x)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(inputs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(ran) == 4 * 20 * 5


def test_dtype_memory_format_and_autocast():
    for prepare in (
        lambda m: m.to(torch.bfloat16),
        lambda m: m.to(memory_format=torch.channels_last),
    ):
        model = prepare(make(Block, torch.float32))
        twin = copy.deepcopy(model)
        fuse(twin, impl="reference")
        x = image(3, dtype=model.conv1.weight.dtype)
        assert torch.equal(twin(x), model(x))
        assert twin(x).is_contiguous(memory_format=torch.channels_last) == model(x).is_contiguous(
            memory_format=torch.channels_last
        )
    build = lambda: nn.Sequential(Block(), BasicBlock(2, 4), BasicBlock(4, 4))  # noqa: E731
    model, twin = make(build, torch.float32), make(build, torch.float32)
    fuse(twin, impl="reference")
    with torch.autocast("cpu", torch.bfloat16):
        assert_alike(observe(model, image(3, dtype=torch.float32)), observe(twin, image(3, dtype=torch.float32)))
    fuse(make(Block, torch.float32).to("meta"))
