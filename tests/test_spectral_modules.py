"""spectral_norm and SpectralNormGroup beside torch's parametrisation."""

import copy
import gc
import weakref

import pytest
import torch
from spectral_case import LAYERS, Discriminator, draw, norms
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from fastcifar.nn import SpectralNormGroup, spectral_norm

# For layers this small, several threads wait more for each other than they work.
pytestmark = pytest.mark.usefixtures("one_thread")
torch_spectral_norm = parametrizations.spectral_norm


def build(normalise):
    """One layer of every kind, the same weights each time."""
    torch.manual_seed(5)
    return nn.ModuleDict({name: normalise(make()) for name, make in LAYERS.items()})


def read(model):
    return {name: layer.weight for name, layer in model.items()}


def small(normalise=spectral_norm):
    torch.manual_seed(2)
    layers = normalise(nn.Conv2d(3, 4, 3)), nn.LeakyReLU(0.2), normalise(nn.ConvTranspose2d(4, 2, 2)), nn.Flatten()
    return nn.Sequential(*layers, normalise(nn.Linear(50, 1)))


IMAGES = draw(2, 3, 6, 6)


def close(ours, theirs, *, rounding=1):
    """Equal to a few float32 roundings of the largest value."""
    scale = float(theirs.detach().abs().max())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=rounding * 2e-6 * max(scale, 1e-3))


def test_a_new_layer_is_torchs():
    ours, theirs = build(spectral_norm).state_dict(), build(torch_spectral_norm).state_dict()
    assert list(ours) == list(theirs)
    for key, value in ours.items():
        close(value, theirs[key])


@pytest.mark.parametrize("iterations", [1, 3])
def test_every_read_in_training_advances_as_torchs_does(iterations):
    ours = build(lambda layer: spectral_norm(layer, n_power_iterations=iterations))
    theirs = build(lambda layer: torch_spectral_norm(layer, n_power_iterations=iterations))
    for _ in range(3):
        for name, weight in read(ours).items():
            close(weight, theirs[name].weight)
    with torch.no_grad():
        read(ours), read(theirs)
    for key, value in ours.state_dict().items():
        close(value, theirs.state_dict()[key])


@pytest.mark.parametrize("grouped", [False, True], ids=["alone", "grouped"])
def test_eval_mode_is_frozen(grouped):
    ours, theirs = build(spectral_norm).eval(), build(torch_spectral_norm).eval()
    group = SpectralNormGroup(ours) if grouped else None
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    for _ in range(2):
        if grouped:
            group.step()
        for name, weight in read(ours).items():
            close(weight, theirs[name].weight)
    assert all(torch.equal(value, before[key]) for key, value in ours.state_dict().items())


@pytest.mark.parametrize("impl", ["native", "reference"])
def test_fifty_steps_of_the_discriminator(impl):
    """Values, gradients, weights, u and v; torch reads each weight once a step here, so that both advance alike."""
    models = Discriminator(torch_spectral_norm, width=2), Discriminator(spectral_norm, width=2)
    group = SpectralNormGroup(models[1], impl=impl)
    assert len(group) == 7
    optimisers = [torch.optim.SGD(model.parameters(), lr=0.02) for model in models]
    labels = torch.arange(4)
    for step in range(50):
        images = draw(4, 3, 32, 32, seed=step)
        group.step()
        losses = []
        for model, optimiser in zip(models, optimisers, strict=True):
            optimiser.zero_grad()
            losses.append(torch.relu(1 - model(images, labels) * (1 if step % 2 else -1)).mean())
            losses[-1].backward()
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-5)
        for (name, theirs), ours in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5, msg=f"{name} at {step}")
        for optimiser in optimisers:
            optimiser.step()
    theirs = models[0].state_dict()
    for key, value in models[1].state_dict().items():
        torch.testing.assert_close(value, theirs[key], rtol=1e-3, atol=2e-5, msg=key)


def test_sigma_converges_to_the_largest_singular_value():
    model = build(spectral_norm)
    group = SpectralNormGroup(model)
    for _ in range(300):
        group.step()
    for name, sigma in group.sigmas.items():
        layer = model[name.removesuffix(".weight")]
        dim = layer.parametrizations.weight[0].dim
        matrix = layer.parametrizations.weight.original.detach().movedim(dim, 0).flatten(1).double()
        expected = torch.linalg.svdvals(matrix)[0]
        torch.testing.assert_close(sigma.double(), expected, rtol=1e-5, atol=0, msg=name)
        close(layer.weight.double(), layer.parametrizations.weight.original.double() / expected, rounding=10)


@pytest.mark.parametrize("grouped", [False, True], ids=["alone", "grouped"])
def test_checkpoints_load_into_each_other(grouped):
    ours, theirs = build(spectral_norm), build(torch_spectral_norm)
    group = SpectralNormGroup(ours) if grouped else None
    for model in (ours, theirs):
        for parameter in model.parameters():
            parameter.data.mul_(1.5)
        read(model)
    fresh = build(spectral_norm)
    fresh_group = SpectralNormGroup(fresh) if grouped else None
    read(fresh)
    fresh.load_state_dict(theirs.state_dict())
    for model in (fresh, theirs):
        model.eval()
    for name, weight in read(fresh).items():
        close(weight, theirs[name].weight)
    theirs.load_state_dict(ours.state_dict())
    ours.eval()
    for name, weight in read(ours).items():
        close(weight, theirs[name].weight)
    assert (group is None) == (fresh_group is None)


def test_a_group_takes_over_torchs_layers():
    theirs = build(torch_spectral_norm)
    expected = copy.deepcopy(theirs)
    keys, buffers = list(theirs.state_dict()), [norm._u for norm in norms(theirs).values()]
    group = SpectralNormGroup(theirs)
    assert len(group) == len(LAYERS) and list(theirs.state_dict()) == keys
    assert all(norm._u is buffer for norm, buffer in zip(norms(theirs).values(), buffers, strict=True))
    group.step()
    for name, weight in read(theirs).items():
        close(weight, expected[name].weight)
    for key, value in expected.state_dict().items():
        close(theirs.state_dict()[key], value)


def test_both_forward_passes_of_a_step_see_one_network():
    model = small()
    group = SpectralNormGroup(model)
    for _ in range(2):
        vectors = [norm._v.clone() for norm in norms(model).values()]
        group.step()
        stepped = [norm._v.clone() for norm in norms(model).values()]
        assert not all(torch.equal(a, b) for a, b in zip(vectors, stepped, strict=True))
        assert torch.equal(model(IMAGES), model(IMAGES))
        with torch.no_grad():
            assert torch.equal(model(IMAGES), model(IMAGES))
        assert all(torch.equal(n._v, v) for n, v in zip(norms(model).values(), stepped, strict=True))


def test_two_backward_passes_through_one_step():
    """As the adaptive hinge does it: each gradient is that of its own loss, none is counted twice."""
    model = small()
    SpectralNormGroup(model).step()
    plain = copy.deepcopy(model).double()
    separate = []
    for scale in (1.0, -2.0):
        separate.append(torch.autograd.grad(scale * model(scale * IMAGES).sum(), list(model.parameters())))
        plain.zero_grad()
        (scale * plain(scale * IMAGES.double()).sum()).backward()
        for ours, parameter in zip(separate[-1], plain.parameters(), strict=True):
            close(ours.double(), parameter.grad, rounding=5)
    real, fake = model(IMAGES), model(-2.0 * IMAGES)
    (-2.0 * fake.sum()).backward()
    real.sum().backward()
    for parameter, first, second in zip(model.parameters(), *separate, strict=True):
        close(parameter.grad, first + second)
    joint = torch.autograd.grad(model(IMAGES).sum() - 2.0 * model(-2.0 * IMAGES).sum(), list(model.parameters()))
    for gradient, first, second in zip(joint, *separate, strict=True):
        close(gradient, first + second)


def test_one_gradient_launch_serves_both_forward_passes(monkeypatch):
    from fastcifar.ops import spectral

    calls = []
    run = spectral._GRADIENT["native"]
    monkeypatch.setitem(spectral._GRADIENT, "native", lambda *a: calls.append("gradient") or run(*a))
    model = small()
    group = SpectralNormGroup(model, impl="native")
    group.step()
    (model(IMAGES) - model(-IMAGES)).sum().backward()
    assert calls == ["gradient"]


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("optimiser", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_an_optimiser_step_is_seen_and_u_waits(optimiser, fused):
    model = small()
    group = SpectralNormGroup(model)
    group.step()
    optimiser = optimiser(model.parameters(), lr=0.5, fused=fused)
    before = model[0].weight.detach().clone()
    model(IMAGES).sum().backward()
    optimiser.step()
    u = model[0].parametrizations.weight[0]._u.clone()
    expected = copy.deepcopy(model).eval()[0].weight
    assert not torch.equal(model[0].weight, before)
    close(model[0].weight, expected)
    assert torch.equal(model[0].parametrizations.weight[0]._u, u)


def test_layers_that_a_backward_pass_does_not_reach_may_change():
    model = nn.ModuleDict({"one": small(), "two": small()})
    SpectralNormGroup(model).step()
    losses = {name: part(IMAGES).sum() for name, part in model.items()}
    losses["one"].backward()
    torch.optim.SGD(model["one"].parameters(), lr=0.5).step()
    losses["two"].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_replicas_normalise_their_own_weights():
    """What nn.DataParallel makes of a module, but for the devices."""
    model = small().eval()
    SpectralNormGroup(model)
    parameters = model[4].parametrizations.weight
    replica = parameters._replicate_for_data_parallel()
    replica._modules = {"0": parameters[0]._replicate_for_data_parallel()}
    replica.original = 3 * parameters.original.detach()
    close(replica(), parameters())
    replica.original = parameters.original.detach().roll(1)
    assert not torch.allclose(replica(), parameters())


def test_weights_made_in_inference_mode():
    with torch.inference_mode():
        model = small().eval()
        expected = model(IMAGES)
        SpectralNormGroup(model)
        close(model(IMAGES), expected)


def test_backward_through_a_stale_graph_says_so():
    model = small()
    group = SpectralNormGroup(model)
    group.step()
    loss = model(IMAGES).sum()
    with torch.no_grad():
        model[4].parametrizations.weight.original.mul_(2)
    with pytest.raises(RuntimeError, match=r"weight of 4\.weight was changed in place .* forward pass again"):
        loss.backward()
    group.step()
    model(IMAGES).sum().backward()


def test_a_step_between_forward_and_backward_does_no_harm():
    model, other = small(), small()
    groups = SpectralNormGroup(model), SpectralNormGroup(other)
    for group in groups:
        group.step()
    loss = model(IMAGES).sum()
    groups[0].step()
    loss.backward()
    other(IMAGES).sum().backward()
    for ours, expected in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours.grad, expected.grad)


def test_frozen_and_unused_layers():
    model = small()
    group = SpectralNormGroup(model)
    group.step()
    original = model[0].parametrizations.weight.original.requires_grad_(False)
    assert not model[0].weight.requires_grad and model[2].weight.requires_grad
    model[2].weight.sum().backward()
    assert original.grad is None and model[4].parametrizations.weight.original.grad is None
    original.requires_grad_()
    model(IMAGES).sum().backward()
    assert original.grad is not None


def test_inference_mode_does_not_spoil_training():
    model = small()
    group = SpectralNormGroup(model)
    with torch.inference_mode():
        group.step()
        model(IMAGES)
    model(IMAGES).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_copies_are_independent():
    model = small()
    group = SpectralNormGroup(model)
    group.step()
    model(IMAGES).sum().backward()
    other = copy.deepcopy(model)
    # σ comes from W v here and from |Wᵀu| in a step.
    close(other(IMAGES), model(IMAGES), rounding=5)
    kept = other(IMAGES).detach()
    group.step()
    assert torch.equal(other(IMAGES), kept) and not torch.equal(model(IMAGES), kept)
    other_group = SpectralNormGroup(other)
    other_group.step()
    assert torch.equal(other(IMAGES), model(IMAGES))
    assert len(group) == len(other_group) == 3


def test_nothing_outlives_the_model():
    model = small()
    group = SpectralNormGroup(model)
    group.step()
    model(IMAGES).sum().backward()
    watched = weakref.ref(model[0].parametrizations.weight.original)
    del model, group
    gc.collect()
    assert watched() is None


def test_casts_keep_float32_vectors():
    model = small()
    group = SpectralNormGroup(model)
    group.step()
    expected = model[0].weight.detach().clone()
    vectors = [norm._u.clone() for norm in norms(model).values()]
    model.to(torch.bfloat16)
    assert model[0].weight.dtype == torch.bfloat16
    assert all(torch.equal(n._u, u) for n, u in zip(norms(model).values(), vectors, strict=True))
    torch.testing.assert_close(model[0].weight.float(), expected, rtol=2e-2, atol=1e-3)
    group.step()
    model(IMAGES.bfloat16()).sum().backward()
    assert model[0].parametrizations.weight.original.grad.dtype == torch.bfloat16
    model.double()
    assert model(IMAGES.double()).dtype == torch.float64 and norms(model)["0.parametrizations.weight.0"]._v.dtype == (
        torch.float64
    )


def test_casts_there_and_back_keep_float32_vectors():
    model = small().double().bfloat16()
    assert model(IMAGES.bfloat16()).isfinite().all()
    assert all(buffer.dtype == torch.float32 for buffer in model.buffers())


def test_a_group_refuses_vectors_that_do_not_fit_their_weights():
    """Kernels write u and v in place, by address."""
    model = small()
    group = SpectralNormGroup(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.double()
    with pytest.raises(TypeError, match=r"u of 0\.weight must be torch\.float64 for a weight of torch\.float64"):
        group.step()
    model = small()
    group = SpectralNormGroup(model)
    model[0].parametrizations.weight.original.data = torch.randn(4, 5, 3, 3)
    with pytest.raises(ValueError, match=r"v of 0\.weight must have shape \(45,\)"):
        group.step()


def test_a_group_takes_strided_vectors():
    expected, model = small(), small()
    state = {
        key: value[:, None].repeat(1, 2)[:, 0] if value.dim() == 1 else value
        for key, value in model.state_dict().items()
    }
    group, _ = SpectralNormGroup(model), SpectralNormGroup(expected)
    model.load_state_dict(state, assign=True)
    assert not model[0].parametrizations.weight[0]._u.is_contiguous()
    close(model.eval()(IMAGES), expected.eval()(IMAGES))
    group.step()


def test_channels_last_weights_keep_their_layout():
    model, other = small(), small()
    model.to(memory_format=torch.channels_last)
    groups = SpectralNormGroup(model), SpectralNormGroup(other)
    for group in groups:
        group.step()
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    (model(IMAGES).sum() + other(IMAGES).sum()).backward()
    for ours, expected in zip(model.parameters(), other.parameters(), strict=True):
        close(ours.grad, expected.grad)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("grouped", [False, True], ids=["alone", "grouped"])
def test_compiles_as_one_graph(grouped, impl):
    models = [small(lambda layer: spectral_norm(layer, impl=impl)) for _ in range(2)]
    groups = [SpectralNormGroup(model) if grouped else None for model in models]
    compiled = torch.compile(models[0], backend="aot_eager", fullgraph=True)
    for _ in range(2):
        for group in filter(None, groups):
            group.step()
        outputs = compiled(IMAGES), models[1](IMAGES)
        for output in outputs:
            output.sum().backward()
        close(*outputs, rounding=5)
    for ours, expected in zip(models[0].parameters(), models[1].parameters(), strict=True):
        close(ours.grad, expected.grad, rounding=20)
    for key, value in models[0].state_dict().items():
        close(value, models[1].state_dict()[key])


def test_groups_of_different_settings_work_together():
    torch.manual_seed(4)
    layers = spectral_norm(nn.Linear(4, 5)), spectral_norm(nn.Linear(5, 6), n_power_iterations=3)
    model = nn.Sequential(*layers, spectral_norm(nn.Linear(6, 2), eps=1e-6))
    expected = copy.deepcopy(model)
    SpectralNormGroup(model).step()
    x = draw(3, 4)
    ours, theirs = model(x), expected(x)
    close(ours, theirs)
    ours.sum().backward()
    theirs.sum().backward()
    for parameter, other in zip(model.parameters(), expected.parameters(), strict=True):
        close(parameter.grad, other.grad)


def test_vectors_are_divided_by_their_norm():
    layer, theirs = nn.Linear(3, 5), nn.Linear(3, 5)
    theirs.load_state_dict(layer.state_dict())
    spectral_norm(layer, "bias")
    torch_spectral_norm(theirs, "bias")
    close(layer.bias, theirs.bias)
    with pytest.raises(ValueError, match="Linear has no spectrally normalised layer"):
        SpectralNormGroup(layer)


def test_removal_gives_a_plain_weight_back():
    model = small()
    group = SpectralNormGroup(model)
    group.step()
    weight = model[0].weight.detach().clone()
    parametrize.remove_parametrizations(model[0], "weight")
    close(model[0].weight.detach(), weight)
    assert type(model[0]) is nn.Conv2d


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: spectral_norm(nn.Linear(2, 2), "wait"), ValueError, "Linear has no parameter or buffer named 'wait'"),
        (lambda: spectral_norm(nn.Linear(2, 2), n_power_iterations=0), ValueError, "must be ≥ 1, got 0"),
        (lambda: spectral_norm(nn.Linear(2, 2), eps=0.0), ValueError, "eps must be > 0, got 0.0"),
        (lambda: spectral_norm(nn.Linear(2, 2), dim=2), IndexError, r"dim must lie in \[-2, 1\]"),
        (lambda: spectral_norm(nn.Linear(2, 2), impl="best"), ValueError, "unknown impl 'best'"),
        (lambda: SpectralNormGroup(nn.Linear(2, 2)), ValueError, "apply fastcifar.nn.spectral_norm"),
        (lambda: SpectralNormGroup(small(), impl="best"), ValueError, "unknown impl 'best'"),
        (lambda: SpectralNormGroup(nn.Sequential(parametrizations.weight_norm(spectral_norm(nn.Linear(2, 2))))),
         ValueError, "has several parametrisations"),
    ],
    ids=["name", "iterations", "eps", "dim", "impl", "nothing to take", "group impl", "chained"],
)  # fmt: skip
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
