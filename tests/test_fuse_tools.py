"""A fused model is the original to compilers, exporters and ranks, and fuse() has one name."""

import copy
import subprocess
import sys
import textwrap

import pytest
import torch
from distributed_case import run_ranks
from fuse_cases import CHANNELS, BasicBlock, Block, TwoSharingAnActivation, several
from fuse_comparison import assert_alike, image, make, observe, optimiser
from torch import nn

from fastcifar import functional
from fastcifar.fuse import fuse

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compiles_without_graph_break(training):
    model = make(several).train(training).append(make(lambda: BasicBlock(CHANNELS, 3, 2)).train(training))
    twin = copy.deepcopy(model)
    fuse(twin)
    for net in (model, twin):
        net[0].inner[0].register_forward_hook(lambda module, args, output: output * 2)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(image(3)), model(image(3)))
    torch.testing.assert_close(dict(twin.named_buffers()), dict(model.named_buffers()))


@pytest.mark.filterwarnings("ignore:.torch.jit.trace")
def test_exporters_and_tracers_see_the_original(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a fused operator was recorded")

    model = make(Block).eval()
    twin = copy.deepcopy(model)
    fuse(twin)
    monkeypatch.setattr(functional, "depthwise_conv_bn_act", refuse)
    x = image(3)
    for record in (
        lambda m: torch.export.export(m, (x,), strict=False).graph,
        lambda m: torch.export.export(m, (x,), strict=True).graph,
        lambda m: torch.fx.symbolic_trace(m).graph,
    ):
        graphs = [[str(node.target) for node in record(m).nodes] for m in (model, twin)]
        assert graphs[1] == graphs[0]
    torch.testing.assert_close(torch.jit.trace(twin, (x,), check_trace=False)(x), model(x))


def test_functional_call():
    model = make(Block).eval()
    twin = copy.deepcopy(model)
    fuse(twin)
    state = {name: tensor * 1.5 for name, tensor in model.state_dict().items()}
    results = [torch.func.functional_call(m, state, (image(3),)) for m in (model, twin)]
    torch.testing.assert_close(results[1], results[0])


def test_names_of_function_and_module():
    """`fastcifar.fuse` is one thing, the callable module, in whatever way it is reached."""
    code = """
        import fastcifar, inspect, torch
        model = torch.nn.Sequential(torch.nn.BatchNorm2d(2), torch.nn.ReLU())
        assert len(fastcifar.fuse(model).fused) == len(fastcifar.fuse(model, impl="auto").fused) == 1
        from fastcifar import fuse, unfuse
        assert not fuse(model, batch_norm=False).fused
        import fastcifar.fuse
        from fastcifar.fuse import fuse as function
        assert fuse is fastcifar.fuse is not function and unfuse is fastcifar.unfuse is fuse.unfuse
        assert inspect.signature(fuse) == inspect.signature(function)
        assert len(function(model).fused) == unfuse(model) == 1
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def _rank(rank, world_size):
    part = image()[rank * 2 : rank * 2 + 2]
    models = [nn.parallel.DistributedDataParallel(make(TwoSharingAnActivation)) for _ in range(2)]
    assert len(fuse(models[1]).fused) == 3
    assert_alike(*(observe(model, part, optimiser(model)) for model in models))
    model = nn.SyncBatchNorm.convert_sync_batchnorm(make(TwoSharingAnActivation))
    fuse(model)
    output, gradients, buffers = _step(model, part)
    return output.numpy(), *({name: t.numpy() for name, t in tensors.items()} for tensors in (gradients, buffers))


def _step(model, x):
    output = model(x)
    output.backward(torch.linspace(-1, 1, output.shape[-1], dtype=output.dtype).expand_as(output))
    return output.detach(), {name: p.grad for name, p in model.named_parameters()}, dict(model.named_buffers())


def test_ranks_distributed_as_the_original_and_synchronised_as_one():
    """Two ranks with two images and one; synchronised statistics against three images at once."""
    output, gradients, buffers = _step(make(TwoSharingAnActivation), image())
    ranks = run_ranks(_rank, 2)
    joined = torch.cat([torch.from_numpy(rank[0]) for rank in ranks])
    torch.testing.assert_close(joined, output, rtol=1e-10, atol=1e-10)
    for name, gradient in gradients.items():
        total = torch.from_numpy(sum(rank[1][name] for rank in ranks))
        torch.testing.assert_close(total, gradient, rtol=1e-10, atol=1e-10)
    for name, buffer in buffers.items():
        for rank in ranks:
            torch.testing.assert_close(torch.from_numpy(rank[2][name]), buffer, rtol=1e-10, atol=1e-10)
