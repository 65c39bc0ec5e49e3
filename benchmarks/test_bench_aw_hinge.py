"""What the adaptive weights cost beside a plain hinge step, and beside the same weights one tensor at a time.

The discriminator is aw_sngan's (390,417 parameters), batch 64.
"""

import statistics

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils.parametrizations import spectral_norm

from benchmarks import agreement, timing
from benchmarks.gan_case import Discriminator, weigh_by_tensors
from benchmarks.timing import DEVICE
from fastcifar import dispatch
from fastcifar.nn import AdaptiveWeightedHinge


class Case:
    """Logits, and the gradients of both losses for every parameter, as two backward passes leave them."""

    def __init__(self, dtype=torch.float32, batch=64):
        network = Discriminator(spectral_norm)
        assert sum(parameter.numel() for parameter in network.parameters()) == 390_417
        self.network = network.to(DEVICE)
        generator = torch.Generator().manual_seed(2)
        self.real, self.fake = (torch.randn(batch, 3, 32, 32, generator=generator).to(DEVICE) for _ in range(2))
        self.labels = torch.randint(100, (batch,), generator=generator).to(DEVICE)
        parameters = list(network.parameters())
        self.logits = [network(images, self.labels) for images in (self.real, self.fake)]
        losses = F.relu(1 - self.logits[0]).mean(), F.relu(1 + self.logits[1]).mean()
        gradients = [torch.autograd.grad(loss, parameters) for loss in losses]
        # The table of the weights does not care for one more parameter that is not a network's.
        self.parameters = [torch.nn.Parameter(p.detach().to(dtype)) for p in parameters]
        self.gradients = [[g.to(dtype) for g in side] for side in gradients]
        self.leaves = [logits.detach().to(dtype).requires_grad_() for logits in self.logits]

    def prepare(self):
        """In training the backward passes have just written the gradients and swept the caches."""
        for parameter in self.parameters:
            parameter.grad = None
        with torch.no_grad():
            self.network(self.real, self.labels)
            for gradient in (*self.gradients[0], *self.gradients[1]):
                gradient.mul_(1.0)

    def by_tensors(self):
        """As one would write it first: Python loops, decisions on the host."""
        self.prepare()
        yield ""
        real, fake = self.leaves
        seeds = torch.autograd.grad(F.relu(1 - real).mean() + F.relu(1 + fake).mean(), self.leaves)
        with torch.no_grad():
            scores = [logits.sigmoid().mean() for logits in self.leaves]
        yield "forward"
        with torch.no_grad():
            weigh_by_tensors(self.parameters, *self.gradients, *scores)
        yield "backward"
        self.seeds = seeds

    def by(self, implementation):
        """The same by an implementation of the operator."""
        hinge = AdaptiveWeightedHinge(self.parameters)
        call = dispatch.Call(device=DEVICE, dtype=torch.float32)
        run = dispatch.select("aw_hinge", implementation, call)

        def step():
            self.prepare()
            yield ""
            with torch.no_grad():
                terms, *seeds = run.hinge_terms(*self.leaves, counts=None, scale=1.0, device_scale=None)
            yield "forward"
            with torch.no_grad():
                scaling = {"scale": 1.0, "device_scale": None}
                weights, _ = run.gradient_weights(terms, *self.gradients, **scaling, **hinge.options)
                hinge._leave(run, self.parameters, *self.gradients, weights)
            yield "backward"
            self.seeds = seeds

        return step

    def results(self, step):
        """∂L/∂logits and the weighted gradients after a step."""
        timing.run(step)
        return [t.detach().double() for t in (*self.seeds, torch.cat([p.grad.flatten() for p in self.parameters]))]


@pytest.fixture(scope="module")
def case():
    return Case()


@pytest.mark.benchmark(group="discriminator step", timer=timing.replayed)
def test_overhead_over_a_plain_hinge_step(keep, smoke, effort, case):
    network, real, fake, labels = case.network, case.real, case.fake, case.labels
    hinge = AdaptiveWeightedHinge(network.parameters())
    optimiser = torch.optim.Adam(network.parameters(), lr=0.0)

    def plain():
        optimiser.zero_grad()
        (F.relu(1 - network(real, labels)).mean() + F.relu(1 + network(fake, labels)).mean()).backward()
        optimiser.step()

    def adaptive():
        optimiser.zero_grad()
        hinge.backward(network(real, labels), network(fake, labels))
        optimiser.step()

    found = timing.in_turns({"plain": plain, "adaptive": adaptive}, **(effort if smoke else effort | {"rounds": 40}))
    rounds = {name: phases["whole"] for name, phases in found.items()}
    overhead = timing.median_ratio(rounds["adaptive"], rounds["plain"]) - 1
    figures = {f"{name}, ms": 1e3 * statistics.median(values) for name, values in rounds.items()}
    keep("hinge-step", [{**figures, "overhead, %": 100 * overhead}], rounds["adaptive"])


@pytest.mark.benchmark(group="weighting alone", timer=timing.replayed)
def test_weighting_against_one_by_tensors(keep, smoke, effort, case):
    steps = {"ours": case.by("auto"), "by tensors": case.by_tensors, "reference": case.by("reference")}
    wide = Case(torch.float64)
    agreement_calls = {name: lambda step=step: case.results(step) for name, step in steps.items()}
    exact = wide.results(wide.by_tensors)
    refused = agreement.refused(agreement_calls, exact, eager="by tensors", ours="ours", eps=2**-23)
    size = sum(parameter.numel() for parameter in case.parameters)
    source = torch.randn(size, device=DEVICE)
    target = torch.empty_like(source)
    calls = {name: step for name, step in steps.items() if name not in refused}
    calls["copy"] = lambda: target.copy_(source)
    # The products read both gradients, the combination reads them again and writes one.
    rows, rounds = timing.measure(
        calls, {"parameters": size}, refused, copied=8 * size,
        moved={"forward": 16 * len(case.labels), "backward": 20 * size, "both": 20 * size + 16 * len(case.labels)},
        operations={"forward": 0, "backward": 9 * size, "both": 9 * size},
        **(effort if smoke else effort | {"rounds": 60, "warmup": 5}),
    )  # fmt: skip
    keep("hinge-weights", rows, rounds)
