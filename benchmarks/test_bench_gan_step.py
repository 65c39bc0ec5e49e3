"""A whole step of aw_sngan, discriminator and generator, beside the same step written plainly."""

import copy
import statistics

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils.parametrizations import spectral_norm

from benchmarks import agreement, timing, training_step
from benchmarks.gan_case import Discriminator, Generator, weigh_by_tensors
from benchmarks.timing import DEVICE
from fastcifar.training import distributed, environment, recipe
from fastcifar.training.adversarial import Adversarial


def plain_step(batch, compiled, amp):
    """Torch's spectral norm, one tensor at a time for the weights, Adam: what the published code does."""
    torch.manual_seed(0)
    generator, discriminator = Generator().to(DEVICE), Discriminator(spectral_norm).to(DEVICE)
    parameters = list(discriminator.parameters())
    optimisers = [torch.optim.Adam(n.parameters(), 4e-4, (0.0, 0.9)) for n in (generator, discriminator)]
    draw, judge = (torch.compile(network) if compiled else network for network in (generator, discriminator))
    real = torch.rand(batch, 3, 32, 32, device=DEVICE) * 2 - 1
    labels = torch.randint(100, (batch,), device=DEVICE)

    def fakes():
        classes = torch.randint(100, (batch,), device=DEVICE)
        return draw(torch.randn(batch, 128, device=DEVICE), classes), classes

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


def our_task(batch, amp_dtype):
    """The training engine, its loader included."""
    generator = numpy.random.default_rng(0)
    images = generator.integers(0, 256, (5000, 32, 32, 3), dtype=numpy.uint8)
    labels = generator.integers(0, 100, 5000)
    made = training_step.dataset()
    small = type(made)(**{**made.__dict__, "train_images": images, "train_labels": labels})
    options = {"model": "aw_sngan", "preset": "demo", "amp_dtype": amp_dtype, "steps": 10_000, "hflip": "off"}
    chosen = recipe.with_budget(recipe.resolve(options | {"batch_size": batch}, has_gpu=False), 5000)
    return Adversarial(chosen, small, DEVICE, distributed.Processes())


def judged(gan, amp_dtype, dtype=torch.float32):
    """Generated images, their logits, and the gradient of these for both networks; u and v stand still."""
    gan = gan.to(dtype).eval()
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(16, 128, generator=generator).to(DEVICE, dtype)
    labels = torch.randint(100, (16,), generator=generator).to(DEVICE)
    gan.zero_grad()
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=amp_dtype == "bf16" and dtype != torch.float64):
        images = gan.generator(latents, labels)
        logits = gan.discriminator(images.contiguous(memory_format=torch.channels_last), labels)
    logits.float().mean().backward() if dtype != torch.float64 else logits.mean().backward()
    gradients = torch.cat([p.grad.flatten() for p in gan.parameters() if p.grad is not None])
    return [t.detach().double() for t in (images, logits, gradients)]


def check(gan, amp_dtype):
    """Raises where our networks are not as near to float64 as their reference implementations."""
    reference = copy.deepcopy(gan)
    for module in reference.modules():
        if hasattr(module, "impl"):
            module.impl = "reference"
    eps = torch.finfo(environment.DTYPES[amp_dtype]).eps
    calls = {"ours": lambda: judged(copy.deepcopy(gan), amp_dtype), "eager": lambda: judged(reference, amp_dtype)}
    exact = judged(copy.deepcopy(reference), amp_dtype, torch.float64)
    agreement.refused(calls, exact, eager="eager", ours="ours", eps=eps)


@pytest.mark.benchmark(group="aw_sngan step", timer=timing.replayed)
def test_step_of_aw_sngan(keep, smoke, effort):
    amp, batch = environment.choose_amp_dtype("auto", DEVICE), 4 if smoke else 64
    calls = {}
    for dtype in dict.fromkeys((amp, "fp32")):
        task = our_task(batch, dtype)
        check(task.model, dtype)
        calls[f"ours, {dtype}"] = training_step.steps_of(task)
        # Compiling takes longer than all else.
        for compiled in (False, True) if dtype == amp and not smoke else (False,):
            name = f"plain{' compiled' if compiled else ''}, {dtype}"
            calls[name] = plain_step(batch, compiled, dtype == "bf16")
    found = timing.in_turns(calls, **effort)
    ours = found[f"ours, {amp}"]["whole"]
    rows = [
        {
            "step of": name, "batch": batch, "ms": 1e3 * statistics.median(phases["whole"]),
            "times ours": timing.median_ratio(phases["whole"], ours), "peak, MiB": timing.peak_mib(calls[name]),
        }
        for name, phases in found.items()
    ]  # fmt: skip
    keep("gan-step", rows, ours)
