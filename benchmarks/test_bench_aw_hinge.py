"""What the adaptive weights cost beside a plain hinge step, and beside the same weights one tensor at a time.

The discriminator is aw_sngan's (390,417 parameters), batch 64. All variants of one test take turns within each round,
so that a slow moment of the machine hits them alike; ratios are medians over rounds.
"""

import statistics

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils.parametrizations import spectral_norm

from benchmarks.gan_case import DEVICE, Discriminator, median_ratio, take_turns, weigh_by_tensors
from fastcifar import dispatch, native
from fastcifar.nn import AdaptiveWeightedHinge

BATCH = 64
STEP_ROUNDS = 40
WEIGHTING_ROUNDS = 60
# Goals: the share of a plain step that the weighting may add, and how many times faster it must be than one by tensors.
OVERHEAD = 0.03 if DEVICE.type == "cuda" else 0.10
SPEEDUP = 3.0


@pytest.fixture(params=["default", "tuned"])
def allocator(request):
    # In this order: the setting cannot be taken back within a process.
    if request.param == "tuned" and not native.tune_allocator():
        pytest.skip("the C library's allocator has no such setting here")
    return request.param


@pytest.fixture(scope="module")
def case():
    network = Discriminator(spectral_norm).to(DEVICE)
    assert sum(parameter.numel() for parameter in network.parameters()) == 390_417
    images = [torch.randn(BATCH, 3, 32, 32, device=DEVICE) for _ in range(2)]
    return network, *images, torch.randint(100, (BATCH,), device=DEVICE)


@pytest.mark.benchmark(group="discriminator step")
def test_overhead_over_a_plain_hinge_step(benchmark, case, allocator, add_row):
    network, real, fake, labels = case
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

    nothing = lambda: None  # noqa: E731
    seconds = take_turns({"plain": (nothing, plain), "adaptive": (nothing, adaptive)}, STEP_ROUNDS)
    overhead = median_ratio(seconds["adaptive"], seconds["plain"]) - 1
    figures = {f"{name}, ms": 1e3 * statistics.median(values) for name, values in seconds.items()}
    add_row("hinge-step", allocator=allocator, **figures, **{"overhead, %": 100 * overhead})
    benchmark.pedantic(adaptive, rounds=5)
    assert overhead <= OVERHEAD


@pytest.mark.benchmark(group="weighting alone")
def test_weighting_against_one_by_tensors(benchmark, case, allocator, add_row):
    network, real, fake, labels = case
    parameters = list(network.parameters())
    real_logits, fake_logits = network(real, labels), network(fake, labels)
    real_gradients = torch.autograd.grad(F.relu(1 - real_logits).mean(), parameters)
    fake_gradients = torch.autograd.grad(F.relu(1 + fake_logits).mean(), parameters)
    scores = [logits.detach().sigmoid().mean() for logits in (real_logits, fake_logits)]
    terms = torch.stack([*scores, *scores]).double()
    hinge = AdaptiveWeightedHinge(parameters)
    call = dispatch.Call(device=DEVICE, dtype=torch.float32)
    run = dispatch.select("aw_hinge", "auto", call)

    @torch.no_grad()
    def prepare():
        # In training the backward passes have just written the gradients and swept the caches.
        network.zero_grad()
        network(real, labels)
        for gradient in (*real_gradients, *fake_gradients):
            gradient.mul_(1.0)

    @torch.no_grad()
    def by_tensors():
        weigh_by_tensors(parameters, real_gradients, fake_gradients, *scores)

    @torch.no_grad()
    def ours():
        weights, _ = run.gradient_weights(terms, real_gradients, fake_gradients, **hinge.options)
        hinge._leave(run, parameters, real_gradients, fake_gradients, weights)

    by_tensors()
    expected = [parameter.grad.clone() for parameter in parameters]
    network.zero_grad()
    ours()
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
    seconds = take_turns({"by tensors": (prepare, by_tensors), "ours": (prepare, ours)}, WEIGHTING_ROUNDS)
    speedup = median_ratio(seconds["by tensors"], seconds["ours"])
    figures = {f"{name}, ms": 1e3 * statistics.median(values) for name, values in seconds.items()}
    add_row("hinge-weights", allocator=allocator, **figures, **{"by tensors / ours": speedup})
    benchmark.pedantic(ours, setup=prepare, rounds=5)
    assert speedup >= SPEEDUP
