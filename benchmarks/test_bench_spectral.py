"""Spectral norm of aw_sngan's discriminator: advance and normalise (forward), gradient (backward), beside torch's.

Once with one forward pass, and once with the two of a GAN's step, D(real) and D(fake): torch's parametrisations advance
and normalise in each, a group does it once.
"""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from benchmarks import agreement, timing
from benchmarks.gan_case import Discriminator
from benchmarks.timing import DEVICE
from fastcifar.nn import SpectralNormGroup


class Loss(torch.autograd.Function):
    """A number whose gradients with respect to the weights are given: what the rest of a network costs the least."""

    @staticmethod
    def forward(ctx, gradients, *weights):
        ctx.gradients = gradients
        return weights[0].new_zeros(())

    @staticmethod
    def backward(ctx, gradient):
        return None, *ctx.gradients


class Case:
    """The weights of a discriminator, normalised by its parametrisations or by a group."""

    def __init__(self, network, passes, make_group=None, compiled=False):
        self.layers = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]
        self.originals = [layer.parametrizations.weight.original for layer in self.layers]
        generator = torch.Generator().manual_seed(1)
        self.gradients = [torch.randn(w.shape, generator=generator).to(w) for w in self.originals]
        self.group = make_group(network) if make_group else None
        self.passes, self.normalise = passes, torch.compile(self.weights) if compiled else self.weights

    def weights(self):
        return [layer.weight for layer in self.layers]

    def step(self):
        for weight in self.originals:
            weight.grad = None
        yield ""
        if self.group is not None:
            self.group.step()
        losses = [Loss.apply(self.gradients, *self.normalise()) for _ in range(self.passes)]
        yield "forward"
        sum(losses[1:], start=losses[0]).backward()
        yield "backward"

    def results(self):
        """The normalised weights of a first pass and the gradients of the original ones."""
        if self.group is not None:
            self.group.step()
        weights = self.normalise()
        for weight in self.originals:
            weight.grad = None
        Loss.apply(self.gradients, *weights).backward()
        return [t.detach().double() for t in (*weights, *(w.grad for w in self.originals))]


@pytest.mark.benchmark(group="spectral norm", timer=timing.replayed)
@pytest.mark.parametrize("passes", [1, 2])
def test_spectral_norm_of_the_discriminator(keep, smoke, effort, request, passes):
    network = Discriminator(spectral_norm).to(DEVICE)

    def case(make_group=None, compiled=False):
        return Case(copy.deepcopy(network), passes, make_group, compiled)

    cases = {
        "group": case(SpectralNormGroup),
        "torch": case(),
        "batched products": case(lambda network: SpectralNormGroup(network, impl="reference")),
    }
    if not smoke and (DEVICE.type == "cuda" or request.config.getoption("--compile")):
        cases["torch.compile"] = case(compiled=True)
    exact = Case(copy.deepcopy(network).double(), passes).results()
    refused = agreement.refused(
        {name: c.results for name, c in cases.items()}, exact, eager="torch", ours="group", eps=2**-23
    )
    size = sum(weight.numel() for weight in cases["group"].originals)
    source = torch.cat([weight.detach().flatten() for weight in cases["group"].originals])
    target = torch.empty_like(source)
    calls = {name: c.step for name, c in cases.items() if name not in refused} | {"copy": lambda: target.copy_(source)}
    # W for W v, for Wᵀu and for W/σ, which is written; dW̄ and W̄ for dW.
    rows, rounds = timing.measure(
        calls, {"layers": len(cases["group"].layers), "forward passes": passes}, refused, copied=8 * size,
        moved={"forward": 16 * size, "backward": 12 * size, "both": 28 * size},
        operations={"forward": 5 * size, "backward": 4 * size, "both": 9 * size},
        **(effort if smoke else effort | {"rounds": 100, "warmup": 10}),
    )  # fmt: skip
    keep("spectral", rows, rounds)
