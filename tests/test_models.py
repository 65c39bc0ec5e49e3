"""Parameter counts of the published networks, and the registry's behaviour."""

import pytest
import torch

from fastcifar.models import count_parameters, create_model, list_models, model_options

PUBLISHED = [
    ("ds_resnet", 100, "torch", 94_372),
    ("ds_resnet_x2", 100, "torch", 334_052),
    ("small_filters_cnn", 100, "torch", 57_332),
    ("small_filters_cnn", 100, "keras", 57_332),
    ("modify_resnet", 100, "keras", 46_203_236),
    ("resnet_cifar10", 10, "torch", 6_573_120),
]
SMALL = ["ds_resnet", "ds_resnet_x2", "small_filters_cnn", "resnet_cifar10"]


@pytest.mark.parametrize(("name", "classes", "convention", "count"), PUBLISHED)
def test_parameter_count_is_the_published_one(name, classes, convention, count):
    with torch.device("meta"):
        model = create_model(name, classes)
    assert count_parameters(model, convention) == count


def test_strides_do_not_change_the_count():
    assert count_parameters(create_model("ds_resnet", strides=(1, 1, 2, 2))) == 94_372


@pytest.mark.parametrize("name", SMALL)
def test_output_and_gradients(name):
    torch.manual_seed(0)
    model = create_model(name, 7)
    logits = model(torch.randn(3, 3, 32, 32))
    assert logits.shape == (3, 7)
    logits.square().sum().backward()
    without = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    # A convolution's bias before batch norm has no gradient by construction; none of these models has one.
    assert not without


def test_modify_resnet_output():
    model = create_model("modify_resnet", 5, widths=(4, 8, 8, 16))
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 5)


@pytest.mark.parametrize(
    "options",
    [
        {"width": 0.5},
        {"strides": (1, 1, 2, 1)},
        {"activation": "silu"},
        {"activation": "leaky_relu"},
        {"block": "inverted-residual"},
        {"impl": "reference"},
    ],
    ids=str,
)
def test_ds_resnet_options_change_the_network_and_it_runs(options):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    model = create_model("ds_resnet", 10, **options)
    logits = model(x)
    assert logits.shape == (2, 10) and logits.isfinite().all()


def test_residual_block_is_the_published_formula():
    torch.manual_seed(0)
    model = create_model("ds_resnet", 10).double().eval()
    block = model.stages[1]
    x = torch.randn(2, 32, 8, 8, dtype=torch.float64)

    def normalised(norm, x):
        return torch.nn.functional.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias)

    def separable(part, x):
        dw = part.depthwise
        y = torch.nn.functional.conv2d(x, dw.weight, None, dw.stride, 1, 1, x.shape[1])
        scale = dw.bn_weight / (dw.running_var + dw.eps).sqrt()
        y = ((y - dw.running_mean.view(-1, 1, 1)) * scale.view(-1, 1, 1) + dw.bn_bias.view(-1, 1, 1)).clamp(min=0)
        return normalised(part.norm, part.pointwise(y))

    expected = separable(block.second, separable(block.first, x).clamp(min=0))
    expected = expected + normalised(block.shortcut.norm, block.shortcut.conv(x))
    torch.testing.assert_close(block(x), expected.clamp(min=0), rtol=1e-12, atol=1e-12)


def test_unknown_names_get_the_nearest_match():
    with pytest.raises(ValueError, match="did you mean 'ds_resnet'"):
        create_model("ds_resent")
    with pytest.raises(ValueError, match="did you mean 'strides'"):
        create_model("ds_resnet", stride=(1, 1, 1, 1))
    with pytest.raises(ValueError, match="unknown convention 'tensorflow'"):
        count_parameters(torch.nn.Linear(1, 1), "tensorflow")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ds_resnet", {"width": 0}, "width must be > 0"),
        ("ds_resnet", {"strides": (1, 2)}, "4 widths"),
        ("ds_resnet", {"strides": (1, 2, 2, 0)}, "strides must be ints"),
        ("ds_resnet", {"activation": "gelu"}, "unknown activation 'gelu'"),
        ("ds_resnet", {"block": "bottleneck"}, "unknown block"),
        ("ds_resnet", {"impl": "cuda"}, "unknown impl"),
        ("small_filters_cnn", {"widths": (8, 16)}, "three ints"),
        ("modify_resnet", {"dropout": 1.0}, r"\[0, 1\)"),
        ("resnet_cifar10", {"logit_scale": 0.0}, "logit_scale must be > 0"),
        ("ds_resnet", {"num_classes": 0}, "num_classes must be an int ≥ 1"),
    ],
)
def test_bad_options_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        create_model(name, **options)


def test_listing():
    assert {name for name, *_ in PUBLISHED} <= set(list_models())
    assert model_options("ds_resnet")["strides"] == (1, 2, 2, 2)
