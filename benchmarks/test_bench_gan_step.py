"""A whole step of aw_sngan, discriminator and generator, beside the same step written plainly."""

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils.parametrizations import spectral_norm

from benchmarks import reporting
from benchmarks.gan_case import DEVICE, Discriminator, Generator, weigh_by_tensors
from fastcifar import data, native
from fastcifar.training import distributed, environment, recipe
from fastcifar.training.adversarial import Adversarial

BATCH = 64


def plain_step(compiled, amp):
    """Torch's spectral norm, one tensor at a time for the weights, Adam: what the published code does."""
    torch.manual_seed(0)
    generator, discriminator = Generator().to(DEVICE), Discriminator(spectral_norm).to(DEVICE)
    parameters = list(discriminator.parameters())
    optimisers = [torch.optim.Adam(n.parameters(), 4e-4, (0.0, 0.9)) for n in (generator, discriminator)]
    draw, judge = (torch.compile(network) if compiled else network for network in (generator, discriminator))
    real = torch.rand(BATCH, 3, 32, 32, device=DEVICE) * 2 - 1
    labels = torch.randint(100, (BATCH,), device=DEVICE)

    def fakes():
        classes = torch.randint(100, (BATCH,), device=DEVICE)
        return draw(torch.randn(BATCH, 128, device=DEVICE), classes), classes

    def step():
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=amp):
            with torch.no_grad():
                images, classes = fakes()
            on_real, on_fake = judge(real, labels).float(), judge(images.float(), classes).float()
        gradients = [
            torch.autograd.grad(loss, parameters) for loss in (F.relu(1 - on_real).mean(), F.relu(1 + on_fake).mean())
        ]
        with torch.no_grad():
            weigh_by_tensors(parameters, *gradients, on_real.sigmoid().mean(), on_fake.sigmoid().mean())
        optimisers[1].step()
        optimisers[0].zero_grad()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=amp):
            images, classes = fakes()
            loss = -judge(images, classes).float().mean()
        loss.backward()
        optimisers[0].step()

    return step


def our_step(amp_dtype):
    """One step of the training engine, its loader included."""
    generator = numpy.random.default_rng(0)
    images = generator.integers(0, 256, (5000, 32, 32, 3), dtype=numpy.uint8)
    labels = generator.integers(0, 100, 5000)
    made = data.load_dataset("synthetic")
    small = type(made)(**{**made.__dict__, "train_images": images, "train_labels": labels})
    options = {"model": "aw_sngan", "preset": "demo", "amp_dtype": amp_dtype, "steps": 10_000, "hflip": "off"}
    chosen = recipe.with_budget(recipe.resolve(options, has_gpu=False), 5000)
    task, number = Adversarial(chosen, small, DEVICE, distributed.Processes()), iter(range(10_000))
    return lambda: task.train_step(next(number))


@pytest.mark.benchmark(group="aw_sngan step")
def test_step_of_aw_sngan(benchmark, add_row):
    native.tune_allocator()
    amp = environment.choose_amp_dtype("auto", DEVICE)
    calls = {"ours": our_step(amp), "ours, fp32": our_step("fp32")}
    calls |= {"plain, fp32": plain_step(False, False), f"plain, {amp}": plain_step(False, amp == "bf16")}
    calls |= {
        "plain compiled, fp32": plain_step(True, False),
        f"plain compiled, {amp}": plain_step(True, amp == "bf16"),
    }
    seconds = reporting.interleaved(calls, rounds=15, warmup=3)
    for name, value in seconds.items():
        add_row("gan-step", **{"step of": name, "ms": 1e3 * value, "times ours": value / seconds["ours"]})
    benchmark.pedantic(calls["ours"], rounds=3)
