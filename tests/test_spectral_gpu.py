"""The Triton spectral normalisation on a GPU: numbers of the function and of a group, CUDA graphs."""

import copy

import oracle
import pytest
import torch
from spectral_case import LAYERS, WEIGHTS, operands
from torch import nn

from fastcifar.functional import spectral_normalize
from fastcifar.nn import SpectralNormGroup, spectral_norm

pytestmark = pytest.mark.gpu
NAMES = ("W/σ", "u", "v", "σ", "dW")


def run(impl, dtype, iterations, device="cpu", kinds=WEIGHTS):
    """W/σ, u, v, σ and dW of all weights, on the CPU."""
    weights, us, vs, gradients = ([t.detach().to(device) for t in tensors] for tensors in operands(dtype, kinds))
    for weight in weights:
        weight.requires_grad_()
    normalised, us, vs, sigmas = spectral_normalize(weights, us, vs, n_power_iterations=iterations, impl=impl)
    torch.autograd.backward(normalised, gradients)
    found = (normalised, us, vs, sigmas, [weight.grad for weight in weights])
    return [[value.detach().cpu().double() for value in values] for values in found]


@pytest.mark.parametrize("iterations", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def test_numbers(dtype, iterations):
    exact, low = (run("reference", kind, iterations) for kind in (torch.float64, dtype))
    found = run("triton", dtype, iterations, "cuda")
    for name, *results in zip(NAMES, found, exact, low, strict=True):
        rounding = dtype if name in ("W/σ", "dW") else torch.float32
        for kind, value, expected, near in zip(WEIGHTS, *results, strict=True):
            oracle.within(value, expected, near, rounding, f"{name} of {kind}")


def test_memcheck():
    kinds = ("wide", "transposed channels-last", "more than a block")
    assert all(t.isfinite().all() for values in run("triton", torch.float32, 1, "cuda", kinds) for t in values)


def stepped(model, impl, steps=3):
    """Normalised weights, σ, u, v and the weights' gradients after some steps of a group, in float64 on the CPU."""
    group = SpectralNormGroup(model, impl=impl)
    for _ in range(steps):
        group.step()
    weights = {name: layer.weight for name, layer in model.items()}
    sum(weight.square().sum() * (1 + i) for i, weight in enumerate(weights.values())).backward()
    found = {
        **weights,
        **{f"σ of {name}": sigma for name, sigma in group.sigmas.items()},
        **dict(model.named_buffers()),
    }
    found |= {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: value.detach().cpu().double() for name, value in found.items()}


def test_a_groups_steps():
    torch.manual_seed(5)
    model = nn.ModuleDict({name: spectral_norm(make()) for name, make in LAYERS.items()})
    copies = copy.deepcopy(model).double(), copy.deepcopy(model)
    exact, low = (stepped(each, "reference") for each in copies)
    found = stepped(model.cuda(), "triton")
    assert found.keys() == exact.keys() and len(found) >= 5 * len(LAYERS)
    for name, value in found.items():
        oracle.within(value, exact[name], low[name], torch.float32, name)


def test_a_step_can_be_captured():
    torch.manual_seed(5)
    model = nn.ModuleDict({name: spectral_norm(make()) for name, make in LAYERS.items()}).cuda()
    plain = copy.deepcopy(model)
    groups = [SpectralNormGroup(each, impl="triton") for each in (model, plain)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        groups[0].step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        groups[0].step()
        captured = [layer.weight for layer in model.values()]
    graph.replay()
    for _ in range(2):
        groups[1].step()
    for ours, layer in zip(captured, plain.values(), strict=True):
        assert torch.equal(ours, layer.weight)
