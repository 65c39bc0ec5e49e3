"""Folded batch norm computes what the network in evaluation does, with plain torch modules only."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

import fastcifar
from fastcifar import fold_batch_norm, models
from fastcifar.nn import BatchNormAct, DepthwiseConvBNAct

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {
    "ds_resnet": {"width": 0.25},
    "ds_resnet_x2": {"block": "inverted-residual", "activation": "silu"},
    "modify_resnet": {"widths": (4, 8, 8, 8)},
    "small_filters_cnn": {},
    "resnet_cifar10": {"widths": (4, 4, 8, 8)},
}
GANS = {name: {"width": 4} if name == "dcgan" else {"width": 4, "discriminator_width": 2} for name in
        models.list_models(gan=True)}  # fmt: skip


def trained(model):
    """The model in float64 with statistics, γ and β as training leaves them."""
    generator = torch.Generator().manual_seed(1)
    model = model.double()
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.copy_(0.3 + torch.rand(tensor.shape, generator=generator, dtype=torch.float64))
        elif tensor.dim() == 1 and tensor.is_floating_point() and not name.endswith(("_u", "_v")):
            tensor.add_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) / 3)
    return model.eval()


def normalisations(model):
    return [m for m in model.modules() if isinstance(m, (nn.modules.batchnorm._BatchNorm, DepthwiseConvBNAct))]


def assert_folded(model, *inputs):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folded = fold_batch_norm(model)
    torch.testing.assert_close(folded(*inputs), model(*inputs), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert not normalisations(folded) and not folded.training
    assert not any(parameter.requires_grad for parameter in folded.parameters())
    return folded


def images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize("name", SMALL)
def test_classifiers(name):
    model = trained(models.create_model(name, 7, **SMALL[name]))
    folded = assert_folded(model, images(3, 3, 32, 32))
    convolutions = [m for m in folded.modules() if isinstance(m, nn.Conv2d)]
    assert all(conv.bias is not None for conv in convolutions)
    # Every normalisation of these networks follows a convolution: no scales are left.
    assert not any(getattr(m, "scale", None) is not None for m in folded.modules())


@pytest.mark.parametrize("conditional", [True, False], ids=["conditional", "unconditional"])
@pytest.mark.parametrize("name", GANS)
def test_generators(name, conditional):
    options = GANS[name] if name == "dcgan" else {**GANS[name], "conditional": conditional}
    gan = trained(models.create_model(name, 7, **options))
    labels = torch.tensor([0, 6, 3]) if gan.conditional else None
    assert_folded(gan.generator, images(3, gan.latent_dim), labels)


@pytest.mark.parametrize(
    "conv",
    [
        lambda: nn.Conv2d(6, 8, 3, stride=2, padding="valid", dilation=2),
        lambda: nn.Conv2d(6, 8, 3, groups=2, bias=False, padding=1, padding_mode="reflect"),
        lambda: nn.ConvTranspose2d(6, 8, 4, stride=2, padding=1, output_padding=1, groups=2),
        lambda: nn.ConvTranspose2d(6, 8, 3, bias=False, dilation=2),
        lambda: spectral_norm(nn.Conv2d(6, 8, 3)),
    ],
    ids=["stride-dilation", "groups-reflect", "transposed-groups", "transposed-dilation", "spectral-norm"],
)
def test_convolutions(conv):
    torch.manual_seed(0)
    folded = assert_folded(trained(nn.Sequential(conv(), BatchNormAct(8, "leaky_relu"))), images(2, 6, 9, 9))
    assert folded[1].scale is None and not hasattr(folded[0], "parametrizations")


class Twice(nn.Module):
    """A convolution whose output is used beside its normalisation, one that runs twice, and a norm of the input."""

    def __init__(self):
        super().__init__()
        self.first, self.again = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(4))

    def forward(self, x):
        x = self.norms[3](x)
        y = self.first(x)
        y = y + self.norms[0](y)
        return self.norms[2](self.again(self.norms[1](self.again(y))))


def test_what_others_use_too_stays():
    torch.manual_seed(0)
    model = trained(Twice())
    folded = assert_folded(model, images(2, 4, 5, 5))
    for name in ("first", "again"):
        torch.testing.assert_close(getattr(folded, name).weight, getattr(model, name).weight, rtol=0, atol=0)


class AddsItsInput(nn.Module):
    """The convolution's output is the residual, too."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.kept = nn.Conv2d(4, 4, 1), BatchNormAct(4, "relu"), []

    def forward(self, x):
        y = self.conv(x)
        self.kept.append(y)
        return self.norm(y, y)


def test_a_residual_that_is_the_convolution_stays():
    torch.manual_seed(0)
    assert_folded(trained(AddsItsInput()), images(2, 4, 5, 5))


def test_a_forward_that_keeps_tensors_keeps_no_symbols():
    assert fold_batch_norm(AddsItsInput()).kept == []


@pytest.mark.parametrize("hooked", [0, 1], ids=["conv", "norm"])
def test_hooks_see_what_they_saw(hooked):
    torch.manual_seed(0)
    model = trained(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()))
    seen = []
    model[hooked].register_forward_hook(lambda module, args, output: seen.append(output))
    folded, x = fold_batch_norm(model), images(2, 4, 5, 5)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-11, atol=1e-11)
    assert isinstance(folded[1], nn.BatchNorm2d) == bool(hooked)


def test_fused_models_are_folded_and_stay_fused():
    torch.manual_seed(0)
    block = nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 1)
    )
    model = trained(block.append(nn.BatchNorm2d(6)))
    fastcifar.fuse(model)
    classes = [type(module) for module in model.modules()]
    assert_folded(model, images(2, 4, 5, 5))
    assert [type(module) for module in model.modules()] == classes


def test_a_norm_under_two_names_is_folded_once():
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(3)
    model = trained(nn.Sequential(norm, nn.ReLU(), norm))
    assert_folded(model, images(2, 3, 4, 4))


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(x) if x.mean() > 0 else x


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)), "1 keeps no running"),
        (Branching(), "Branching.forward cannot be traced"),
    ],
    ids=["no statistics", "branch on data"],
)
def test_what_cannot_be_folded_is_named(model, message):
    twin = copy.deepcopy(model)
    with pytest.raises(ValueError, match=message):
        fold_batch_norm(model)
    assert str(model) == str(twin)
