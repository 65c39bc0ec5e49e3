"""What the adaptive weights cost beside a plain hinge step, and beside the same weights one tensor at a time.

    python -m pytest benchmarks/test_bench_aw_hinge.py --benchmark-json=benchmarks/results/aw_hinge.json

The discriminator is aw_sngan's (390,417 parameters), batch 64. All variants of one test take turns within each round,
so that a slow moment of the machine hits them alike; ratios are medians over rounds.
"""

import math
import statistics
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from fastcifar import dispatch, native
from fastcifar.nn import AdaptiveWeightedHinge

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BATCH = 64
STEP_ROUNDS = 40
WEIGHTING_ROUNDS = 60
# Goals: the share of a plain step that the weighting may add, and how many times faster it must be than one by tensors.
OVERHEAD = 0.03 if DEVICE.type == "cuda" else 0.10
SPEEDUP = 3.0


class Discriminator(nn.Module):
    """aw_sngan's: seven spectrally normalised convolutions, a linear head, a projection of the label."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layers, channels = [], 3
        for width, kernel in zip((16, 16, 32, 32, 64, 64, 128), (3, 4, 3, 4, 3, 4, 3), strict=True):
            stride = 2 if kernel == 4 else 1
            layers += [spectral_norm(nn.Conv2d(channels, width, kernel, stride, 1)), nn.LeakyReLU(0.2)]
            channels = width
        self.features = nn.Sequential(*layers, nn.Flatten())
        self.head = nn.Linear(2048, 1)
        self.projection = nn.Embedding(100, 2048)

    def forward(self, images, labels):
        features = self.features(images)
        return self.head(features).squeeze(1) + (self.projection(labels) * features).sum(1)


def weigh_by_tensors(parameters, real, fake, s_r, s_f):
    """The table of the weights as one would write it first: Python loops, decisions on the host."""
    rr = sum((r * r).sum() for r in real) + 1e-4
    ff = sum((f * f).sum() for f in fake) + 1e-4
    rf = sum((r * f).sum() for r, f in zip(real, fake, strict=True)).item()
    s_r, s_f, r, f = s_r.item(), s_f.item(), math.sqrt(rr.item()), math.sqrt(ff.item())
    w_r, w_f = 1 / r, 1 / f
    if s_r < 0.5 or s_r < s_f - 0.05:
        w_f = -rf / (f * f * r) if rf <= 0 else 0.0
    elif s_r > 0.75 and s_r > s_f - 0.05:
        w_r = -rf / (r * r * f) if rf <= 0 else 0.0
    for parameter, real_part, fake_part in zip(parameters, real, fake, strict=True):
        parameter.grad = (w_r + 0.05) * real_part + (w_f + 0.05) * fake_part


def take_turns(variants, rounds, warm_up=5):
    """Seconds of each variant in each round."""
    seconds = {name: [] for name in variants}
    for number in range(warm_up + rounds):
        for name, (prepare, run) in variants.items():
            prepare()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            if number >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def median_ratio(numerator, denominator):
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def record(benchmark, seconds, **figures):
    for name, values in seconds.items():
        figures[f"{name}_ms"] = statistics.median(values) * 1e3
    benchmark.extra_info.update(figures, device=str(DEVICE), torch=torch.__version__, threads=torch.get_num_threads())
    print("\n" + "  ".join(f"{name}={value:.3f}" for name, value in figures.items()))


@pytest.fixture(params=["default", "tuned"])
def allocator(request):
    # In this order: the setting cannot be taken back within a process.
    if request.param == "tuned" and not native.tune_allocator():
        pytest.skip("the C library's allocator has no such setting here")
    return request.param


@pytest.fixture(scope="module")
def case():
    network = Discriminator().to(DEVICE)
    assert sum(parameter.numel() for parameter in network.parameters()) == 390_417
    images = [torch.randn(BATCH, 3, 32, 32, device=DEVICE) for _ in range(2)]
    return network, *images, torch.randint(100, (BATCH,), device=DEVICE)


@pytest.mark.benchmark(group="discriminator step")
def test_overhead_over_a_plain_hinge_step(benchmark, case, allocator):
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
    record(benchmark, seconds, overhead_percent=100 * overhead)
    benchmark.pedantic(adaptive, rounds=5)
    assert overhead <= OVERHEAD


@pytest.mark.benchmark(group="weighting alone")
def test_weighting_against_one_by_tensors(benchmark, case, allocator):
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
    seconds = take_turns({"by_tensors": (prepare, by_tensors), "ours": (prepare, ours)}, WEIGHTING_ROUNDS)
    speedup = median_ratio(seconds["by_tensors"], seconds["ours"])
    record(benchmark, seconds, speedup=speedup)
    benchmark.pedantic(ours, setup=prepare, rounds=5)
    assert speedup >= SPEEDUP
