"""The adaptive-weighted hinge against its definition, written out here in Python numbers."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastcifar import dispatch, native
from fastcifar.nn import AdaptiveWeightedHinge

NATIVE = pytest.param("native", marks=pytest.mark.skipif(native.module() is None, reason=str(native.why_not())))
IMPLEMENTATIONS = (NATIVE, "reference")
CONSTANTS = {"alpha1": 0.5, "alpha2": 0.75, "delta": 0.05, "epsilon": 0.05, "normalized": True}


@pytest.fixture(autouse=True)
def one_thread():
    """Networks this small gain nothing from a second thread, and wait for it where the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def phases(impl):
    return dispatch.select("aw_hinge", impl, dispatch.Call(torch.device("cpu"), torch.float32))


def plain_weights(rr, ff, rf, s_r, s_f, alpha1, alpha2, delta, epsilon, normalized):
    """The table of the paper's code; rr and ff come without the 1e-4."""
    rr, ff = rr + 1e-4, ff + 1e-4
    r, f = (math.sqrt(rr), math.sqrt(ff)) if normalized else (1.0, 1.0)
    if s_r < alpha1 or s_r < s_f - delta:
        return (1 / r + epsilon, -rf / (ff * r) + epsilon) if rf <= 0 else (1 / r + epsilon, epsilon)
    if s_r > alpha2 and s_r > s_f - delta:
        return (-rf / (rr * f) + epsilon, 1 / f + epsilon) if rf <= 0 else (epsilon, 1 / f + epsilon)
    return 1 / r + epsilon, 1 / f + epsilon


def plain_backward(parameters, real_logits, fake_logits, **changed):
    """Two backward passes, Python numbers, one tensor at a time; returns what the step found."""
    loss_real, loss_fake = F.relu(1 - real_logits).mean(), F.relu(1 + fake_logits).mean()
    real = torch.autograd.grad(loss_real, parameters, retain_graph=True)
    fake = torch.autograd.grad(loss_fake, parameters)
    rr, ff, rf = (
        sum((a.double() * b.double()).sum().item() for a, b in zip(left, right, strict=True))
        for left, right in ((real, real), (fake, fake), (real, fake))
    )
    s_r, s_f = real_logits.double().sigmoid().mean().item(), fake_logits.double().sigmoid().mean().item()
    w_r, w_f = plain_weights(rr, ff, rf, s_r, s_f, **{**CONSTANTS, **changed})
    for parameter, r, f in zip(parameters, real, fake, strict=True):
        parameter.grad = (w_r * r.double() + w_f * f.double()).to(parameter.dtype)
    norms = math.sqrt(rr + 1e-4), math.sqrt(ff + 1e-4)
    return [loss_real.item(), loss_fake.item(), s_r, s_f, w_r, w_f, *norms, rf / (norms[0] * norms[1])]


class Discriminator(nn.Module):
    """Spectrally normalised convolutions and a projection, as aw_sngan's, on 8×8 images."""

    def __init__(self, seed=3):
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 5, 3, padding=1))
        self.second = nn.utils.parametrizations.spectral_norm(nn.Conv2d(5, 7, 4, stride=2, padding=1))
        self.head = nn.Linear(7 * 16, 1)
        self.projection = nn.Embedding(4, 7 * 16)

    def forward(self, images, labels):
        features = F.leaky_relu(self.second(F.leaky_relu(self.first(images), 0.2)), 0.2).flatten(1)
        return self.head(features).squeeze(1) + (self.projection(labels) * features).sum(1)


def small_case(dtype=torch.float64, n_real=5, n_fake=3):
    torch.manual_seed(7)
    network = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).to(dtype)
    return network, torch.randn(n_real, 4, dtype=dtype), torch.randn(n_fake, 4, dtype=dtype)


# (s_r, s_f): which row of the table, its boundaries included.
SCORES = {
    "real-low": (0.4, 0.1),
    "real-below-fake": (0.6, 0.7),
    "real-high-but-below-fake": (0.8, 0.9),
    "real-high": (0.8, 0.3),
    "between": (0.6, 0.5),
    "at-alpha1": (0.5, 0.5),
    "at-alpha2": (0.75, 0.5),
    "at-fake-minus-delta": (0.875, 0.9375),
}
ANGLES = {"acute": 1.5, "right": 0.0, "obtuse": -1.5}


def gradients_at(angle):
    """Two lists of three gradients (one missing on each side) with ⟨r, f⟩ = 4·angle."""
    real = [torch.full((2, 2), 2.0), torch.tensor([3.0]), None]
    fake = [torch.full((2, 2), angle / 2), None, torch.tensor([[0.5], [-1.0]])]
    return real, fake


@pytest.mark.parametrize("normalized", [True, False], ids=["normalised", "plain"])
@pytest.mark.parametrize("angle", ANGLES)
@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_every_branch(impl, scores, angle, normalized):
    options = {**CONSTANTS, "normalized": normalized, "delta": 0.0625}
    real, fake = gradients_at(ANGLES[angle])
    terms = torch.tensor([1.0, 2.0, *SCORES[scores]], dtype=torch.float64)
    weights, finite = phases(impl).gradient_weights(terms, real, fake, **options)
    product = 4 * ANGLES[angle]
    expected = plain_weights(25.0, ANGLES[angle] ** 2 + 1.25, product, *SCORES[scores], **options)
    assert finite.item()
    np.testing.assert_allclose(weights[:2].numpy(), expected, rtol=1e-14)


@pytest.mark.parametrize("normalized", [True, False], ids=["normalised", "plain"])
@pytest.mark.parametrize("side", ["real-low", "real-high"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_obtuse_update_is_orthogonal_to_the_other_gradient(impl, side, normalized):
    generator = torch.Generator().manual_seed(2)
    r = torch.randn(50, generator=generator, dtype=torch.float64) * 30
    f = torch.randn(50, generator=generator, dtype=torch.float64) * 20 - 0.4 * r
    terms = torch.tensor([1.0, 1.0, *SCORES[side]], dtype=torch.float64)
    options = {**CONSTANTS, "epsilon": 0.0, "normalized": normalized}
    weights, _ = phases(impl).gradient_weights(terms, [r], [f], **options)
    update = torch.empty_like(r)
    phases(impl).combine_([update], [r], [f], weights, accumulate=[False])
    favoured, other = (r, f) if side == "real-low" else (f, r)
    cosine = lambda a, b: (a.dot(b) / (a.norm() * b.norm())).item()  # noqa: E731
    assert cosine(r, f) < -0.3
    # The 1e-4 in the squared norm leaves this much.
    assert abs(cosine(update, other)) < 1e-4 / other.dot(other).item() * 2
    assert cosine(update, favoured) > 0.5


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-4)], ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_hundred_steps_equal_a_plain_implementation(impl, dtype, tolerance):
    generator = torch.Generator().manual_seed(1)
    networks = [Discriminator().to(dtype) for _ in range(2)]
    optimisers = [torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.5) for network in networks]
    ours = AdaptiveWeightedHinge(networks[0].parameters(), impl=impl)
    branches = set()
    for step in range(100):
        real = torch.randn(6, 3, 8, 8, generator=generator, dtype=dtype) + 0.3
        fake = torch.randn(4, 3, 8, 8, generator=generator, dtype=dtype) * (0.5 + step / 100)
        labels = torch.randint(4, (6,), generator=generator)
        logits = [(network(real, labels), network(fake, labels[:4])) for network in networks]
        for optimiser in optimisers:
            optimiser.zero_grad()
        found = ours.backward(*logits[0])
        expected = plain_backward(list(networks[1].parameters()), *logits[1])
        assert found.finite.item()
        np.testing.assert_allclose([value.item() for value in found[:9]], expected, rtol=tolerance, atol=tolerance)
        branches.add((expected[2] < 0.5, expected[2] > 0.75, expected[-1] <= 0))
        for optimiser in optimisers:
            optimiser.step()
    for (name, a), b in zip(networks[0].named_parameters(), networks[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")
    assert len(branches) >= 3, branches


@pytest.mark.parametrize("shapes", [("N", "N"), ("N", "N1"), ("N1", "N"), ("N1", "N1")], ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_logits_of_either_shape(impl, shapes):
    network, real, fake = small_case()
    shaped = [
        network(images) if shape == "N1" else network(images)[:, 0]
        for images, shape in zip((real, fake), shapes, strict=True)
    ]
    found = AdaptiveWeightedHinge(network.parameters(), impl=impl).backward(*shaped)
    gradients = [parameter.grad.clone() for parameter in network.parameters()]
    expected = plain_backward(list(network.parameters()), network(real), network(fake))
    np.testing.assert_allclose([value.item() for value in found[:9]], expected, rtol=1e-12)
    for gradient, parameter in zip(gradients, network.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_frozen_and_unused_parameters(impl):
    network, real, fake = small_case()
    unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
    network[0].weight.requires_grad_(False)
    hinge = AdaptiveWeightedHinge([*network.parameters(), unused], impl=impl)
    found = hinge.backward(network(real), network(fake))
    assert network[0].weight.grad is None and unused.grad is None
    trained = [network[0].bias, *network[2].parameters()]
    gradients = [parameter.grad.clone() for parameter in trained]
    expected = plain_backward(trained, network(real), network(fake))
    np.testing.assert_allclose([value.item() for value in found[:9]], expected, rtol=1e-12)
    for gradient, parameter in zip(gradients, trained, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-12, atol=1e-14)

    network[0].weight.requires_grad_(True)
    hinge.backward(network(real), network(fake))
    assert network[0].weight.grad is not None


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_parameter_of_one_side_only(impl):
    network, real, fake = small_case()
    extra = nn.Parameter(torch.tensor([0.3], dtype=torch.float64))
    found = AdaptiveWeightedHinge([*network.parameters(), extra], impl=impl).backward(
        network(real) * extra, network(fake)
    )
    loss = F.relu(1 - network(real) * extra).mean()
    gradient = torch.autograd.grad(loss, extra)[0]
    torch.testing.assert_close(extra.grad, found.weight_real * gradient, rtol=1e-12, atol=0)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_gradients_accumulate(impl):
    network, real, fake = small_case()
    hinge = AdaptiveWeightedHinge(network.parameters(), impl=impl)
    step = lambda: hinge.backward(network(real), network(fake))  # noqa: E731
    step()
    once = [parameter.grad.clone() for parameter in network.parameters()]
    step()
    for gradient, parameter in zip(once, network.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, 2 * gradient, rtol=1e-12, atol=1e-15)

    network.zero_grad(set_to_none=False)
    step()
    network[0].weight.grad = None
    network[0].bias.grad = torch.ones_like(network[0].bias)
    network[2].weight.grad.zero_()
    step()
    for gradient, parameter, sign in zip(once, network.parameters(), (0, 1, 0, None), strict=True):
        before = gradient if sign is None else torch.full_like(gradient, sign)
        torch.testing.assert_close(parameter.grad, before + gradient, rtol=1e-12, atol=1e-15)


def test_gradients_are_the_same_memory_every_step():
    network, real, fake = small_case()
    hinge = AdaptiveWeightedHinge(network.parameters())
    addresses = []
    for _ in range(2):
        network.zero_grad()
        hinge.backward(network(real), network(fake))
        addresses.append([parameter.grad.data_ptr() for parameter in network.parameters()])
    assert addresses[0] == addresses[1]


@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_scale_is_taken_out_before_the_weights(impl, as_tensor):
    network, real, fake = small_case()
    hinge = AdaptiveWeightedHinge(network.parameters(), impl=impl)
    plain = hinge.backward(network(real), network(fake))
    gradients = [parameter.grad.clone() for parameter in network.parameters()]
    network.zero_grad()
    scale = torch.tensor([4096.0]) if as_tensor else 4096.0
    scaled = hinge.backward(network(real), network(fake), scale=scale)
    np.testing.assert_allclose([v.item() for v in scaled], [v.item() for v in plain], rtol=1e-13)
    for gradient, parameter in zip(gradients, network.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, 4096 * gradient, rtol=1e-13, atol=0)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_grad_scaler_steps_and_skips(impl):
    network, real, fake = small_case(torch.float32)
    before = [parameter.detach().clone() for parameter in network.parameters()]
    optimiser = torch.optim.SGD(network.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    hinge = AdaptiveWeightedHinge(network.parameters(), impl=impl)
    one = torch.ones(())

    def step(images):
        optimiser.zero_grad()
        found = hinge.backward(network(images), network(fake), scale=scaler.scale(one))
        scaler.step(optimiser)
        scaler.update()
        return found

    assert not step(real * math.inf).finite.item()
    assert scaler.get_scale() == 512.0
    for parameter, start in zip(network.parameters(), before, strict=True):
        assert torch.equal(parameter, start)
    assert step(real).finite.item()
    stepped = [parameter.detach().clone() for parameter in network.parameters()]
    with torch.no_grad():
        for parameter, start in zip(network.parameters(), before, strict=True):
            parameter.copy_(start)
    optimiser.zero_grad()
    plain_backward(list(network.parameters()), network(real), network(fake))
    optimiser.step()
    for parameter, expected in zip(stepped, network.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("side", ["real", "fake"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_gradients_that_are_not_finite_are_reported(impl, value, side):
    r, f = torch.ones(5), torch.ones(5)
    (r if side == "real" else f)[3] = value
    terms = torch.tensor([1.0, 1.0, 0.4, 0.4], dtype=torch.float64)
    weights, finite = phases(impl).gradient_weights(terms, [torch.ones(2), r], [torch.ones(2), f], **CONSTANTS)
    assert not finite.item()
    assert weights[:2].isnan().all()
    target = torch.zeros(2)
    phases(impl).combine_([target], [None], [torch.ones(2)], weights, accumulate=[True])
    assert target.isnan().all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_logits_that_are_not_finite_are_reported(impl):
    network, real, fake = small_case()
    real[2, 1] = math.nan
    found = AdaptiveWeightedHinge(network.parameters(), impl=impl).backward(network(real), network(fake))
    assert not found.finite.item()
    assert found.loss_real.isnan() and found.weight_real.isnan() and found.weight_fake.isnan()
    assert found.loss_fake.isfinite()
    assert all(parameter.grad.isnan().all() for parameter in network.parameters())


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_logits_of_one_graph(impl):
    network, real, fake = small_case()
    logits = network(torch.cat([real, fake]))
    found = AdaptiveWeightedHinge(network.parameters(), impl=impl).backward(logits[:5], logits[5:])
    expected = plain_backward(list(network.parameters()), network(real), network(fake))
    np.testing.assert_allclose([value.item() for value in found[:9]], expected, rtol=1e-12)


def test_graphs_are_freed():
    network, real, fake = small_case()
    real_logits, fake_logits = network(real), network(fake)
    AdaptiveWeightedHinge(network.parameters()).backward(real_logits, fake_logits)
    for logits in (real_logits, fake_logits):
        with pytest.raises(RuntimeError, match="second time"):
            logits.sum().backward()


def test_two_backward_passes_and_nothing_for_the_generator(monkeypatch):
    network, real, _ = small_case()
    generator = nn.Linear(2, 4).double()
    passes = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: passes.append(k.get("retain_graph")) or grad(*a, **k))
    fake = generator(torch.randn(3, 2, dtype=torch.float64))
    hinge = AdaptiveWeightedHinge(network.parameters())
    hinge.backward(network(real), network(fake))
    assert passes == [False, None]
    assert all(parameter.grad is None for parameter in generator.parameters())
    loss = hinge.generator_loss(network(fake))
    assert loss.item() == pytest.approx(-network(fake).mean().item())
    loss.backward()
    assert all(parameter.grad is not None for parameter in generator.parameters())
