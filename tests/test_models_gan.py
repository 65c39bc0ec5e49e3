"""The GANs: published counts, shapes, conditioning, options."""

import copy

import pytest
import torch

from fastcifar.models import count_parameters, create_model, list_models
from fastcifar.models.gan import first_layer
from fastcifar.nn import ConditionalBatchNormAct, SpectralNormGroup


def test_the_published_counts():
    gan = create_model("aw_sngan", 100)
    assert count_parameters(gan.generator) == 549_216
    assert count_parameters(gan.discriminator) == 390_417
    assert count_parameters(gan) == 939_633
    # The published figure counts u and v, one pair for each of the seven spectrally normalised convolutions.
    assert count_parameters(gan, "spectral_norm") == 942_812
    dcgan = create_model("dcgan")
    assert count_parameters(dcgan.generator) == 370_624
    assert count_parameters(dcgan.discriminator) == 167_808


CASES = [
    ("dcgan", {}),
    ("aw_sngan", {}),
    ("aw_sngan", {"conditional": False}),
    ("aw_sngan", {"minibatch_deviation": True}),
    ("aw_sngan_res", {"width": 16, "discriminator_width": 8}),
    ("aw_sngan_res", {"width": 16, "discriminator_width": 8, "conditional": False, "minibatch_deviation": True}),
    ("aw_sngan_light", {"width": 8}),
    ("aw_sngan_light", {"width": 8, "conditional": False}),
]


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_images_logits_and_gradients(name, options):
    torch.manual_seed(0)
    gan = create_model(name, 10, **options)
    assert gan.conditional == (options.get("conditional", True) and name != "dcgan")
    labels = torch.tensor([0, 3, 9, 3]) if gan.conditional else None
    images = gan(torch.randn(4, gan.latent_dim), labels)
    assert images.shape == (4, 3, 32, 32) and images.abs().max() <= 1
    logits = gan.discriminator(images, labels)
    assert logits.shape == (4,)
    logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in gan.parameters())
    # Labels matter where there are any.
    if labels is not None:
        with torch.no_grad():
            assert not torch.equal(gan.discriminator(images, labels.flip(0)), logits)
        with pytest.raises(ValueError, match="labels"):
            gan.discriminator(images)
        with pytest.raises(ValueError, match="labels"):
            gan(torch.randn(4, gan.latent_dim))


def test_conditional_batch_norm_is_what_it_says():
    torch.manual_seed(0)
    layer = ConditionalBatchNormAct(3, 5).double()
    torch.nn.init.normal_(layer.embedding.weight)
    x, labels = torch.randn(6, 3, 4, 4, dtype=torch.float64), torch.tensor([0, 1, 4, 4, 2, 0])
    normalised = torch.nn.functional.batch_norm(x, None, None, training=True)
    gamma, beta = layer.embedding.weight[labels].split(3, 1)
    expected = torch.nn.functional.leaky_relu(gamma[:, :, None, None] * normalised + beta[:, :, None, None], 0.2)
    torch.testing.assert_close(layer(x, labels), expected)
    layer.eval()
    one = layer(x[:1], labels[:1])
    torch.testing.assert_close(one, layer(x, labels)[:1])


def test_fresh_conditional_norms_change_nothing():
    plain, layer = torch.nn.BatchNorm2d(4), ConditionalBatchNormAct(4, 7)
    x = torch.randn(5, 4, 3, 3)
    expected = torch.nn.functional.leaky_relu(plain(x), 0.2)
    torch.testing.assert_close(layer(x, torch.randint(7, (5,))), expected)


def test_the_first_layer_is_the_transposed_convolution():
    generator = create_model("aw_sngan", 10).generator.double()
    z = torch.randn(3, 128, dtype=torch.float64)
    expected = generator.convolutions[0](z[:, :, None, None])
    torch.testing.assert_close(first_layer(z, generator.convolutions[0]), expected)


def test_minibatch_deviation_sees_a_collapse():
    torch.manual_seed(0)
    discriminator = create_model("aw_sngan", 10, conditional=False, minibatch_deviation=True).discriminator
    x = torch.randn(8, 5, 4, 4)
    varied = discriminator.deviation(x)
    assert varied.shape == (8, 6, 4, 4) and torch.equal(varied[:, :5], x)
    same = discriminator.deviation(x[:1].expand(8, -1, -1, -1))
    assert same[:, 5].max() < 1e-3 < varied[:, 5].min()
    assert discriminator.deviation(x[:7]).shape == (7, 6, 4, 4)


def test_the_group_takes_all_seven_layers_and_copies_are_independent():
    gan = create_model("aw_sngan", 10)
    assert len(SpectralNormGroup(gan.discriminator)) == 7
    twin = copy.deepcopy(gan)
    twin.load_state_dict(gan.state_dict())


def test_gans_are_listed_apart():
    assert {"dcgan", "aw_sngan", "aw_sngan_res", "aw_sngan_light"} == set(list_models(gan=True))
    assert not set(list_models(gan=True)) & set(list_models(gan=False))
    assert set(list_models()) == {*list_models(gan=True), *list_models(gan=False)}


@pytest.mark.parametrize("name", ["dcgan", "aw_sngan", "aw_sngan_res", "aw_sngan_light"])
def test_bad_sizes(name):
    with pytest.raises(ValueError, match=f"{name}: .*≥ 1, got"):
        create_model(name, width=0)
