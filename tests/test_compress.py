"""Pruned and quantised networks: what they compute, what they hold, how they are found again."""

import importlib.util
import json

import pytest
import torch
from torch import nn
from training_case import result_of, status_of, write_tiny

from fastcifar import compress, evaluate, models
from fastcifar.deploy import pruning

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"),
]
ONNX = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="compressing needs onnx, onnxscript and onnxruntime: pip install 'fastcifar[compress]'",
)
NETWORKS = {
    "residual": ("ds_resnet", {"width": 0.5}),
    "inverted-residual": ("ds_resnet", {"width": 0.25, "block": "inverted-residual"}),
    "with biases": ("modify_resnet", {"widths": (16, 16, 24, 24)}),
}


def trained(name, options):
    """A network with statistics, γ and β as training leaves them."""
    torch.manual_seed(0)
    model = models.create_model(name, 7, **options).double().eval()
    for key, tensor in model.state_dict().items():
        if key.endswith("running_var"):
            tensor.uniform_(0.3, 2)
        elif tensor.dim() == 1 and tensor.is_floating_point():
            tensor.add_(torch.randn_like(tensor) / 3)
    return model


@pytest.mark.parametrize(("name", "options"), NETWORKS.values(), ids=NETWORKS)
def test_a_pruned_network_is_the_network_without_these_channels(name, options):
    model = trained(name, options)
    kept = pruning.kept_channels(model, 0.5)
    widths = [len(indices) for indices in kept]
    smaller = models.create_model(name, 7, **options, inner_widths=widths).double().eval()
    smaller.load_state_dict(pruned := pruning.pruned_state(model, kept))
    # The original, when what reads the inner channels does not look at the others.
    for inner, indices in zip(pruning.inner_channels(model), kept, strict=True):
        weight = model.get_submodule(f"{inner.block}.{inner.read}").weight.data
        ignored = torch.ones(weight.shape[1], dtype=torch.bool)
        ignored[indices] = False
        weight[:, ignored] = 0
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(smaller(x), model(x), rtol=1e-11, atol=1e-11)
    assert sum(t.numel() for t in pruned.values()) < sum(t.numel() for t in model.state_dict().values())


def test_the_weakest_channels_go_in_groups_of_eight():
    model = trained("ds_resnet", {})
    norms = [model.get_submodule(f"{i.block}.{i.norm}") for i in pruning.inner_channels(model)]
    for place, norm in enumerate(norms):
        norm.weight.data.copy_(torch.linspace(-1, 0.01, len(norm.weight)) if place else torch.full((32,), 1e-3))
    kept = pruning.kept_channels(model, 0.5)
    # The first block is all below the threshold and keeps a group; the others lose their last channels.
    assert len(kept[0]) == 8 and all(len(indices) % 8 == 0 for indices in kept)
    for indices, norm in zip(kept[1:], norms[1:], strict=True):
        assert torch.equal(indices, torch.arange(len(indices))) and len(indices) < len(norm.weight)
    removed = sum(len(norm.weight) for norm in norms) - sum(map(len, kept))
    assert 0.4 * 320 < removed <= 0.5 * 320


def test_a_network_without_such_blocks_is_refused():
    with pytest.raises(ValueError, match="SmallFiltersCNN has no blocks with inner channels"):
        pruning.kept_channels(models.create_model("small_filters_cnn", 7), 0.5)


@pytest.mark.parametrize("widths", [(8, 8, 8), (8, 8, 8, 0), 8, ("a", 8, 8, 8)], ids=str)
def test_inner_widths_are_checked(widths):
    with pytest.raises(ValueError, match="inner_widths must be 4 ints"):
        models.create_model("ds_resnet", 7, inner_widths=widths)


def test_zeros_are_the_smallest_weights_and_stay():
    torch.manual_seed(0)
    model = models.create_model("ds_resnet", 7, width=0.25).to(memory_format=torch.channels_last)
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.dim() > 1}
    pruning.zero_weights(model, 0.6)
    after = dict(model.named_parameters())
    everything = torch.cat([weight.abs().flatten() for weight in weights.values()]).sort().values
    threshold = everything[round(0.6 * len(everything))]
    for name, weight in weights.items():
        assert torch.equal(after[name], torch.where(weight.abs() < threshold, 0.0, weight))
    optimiser = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    with pruning.zeros_held(model):
        for _ in range(2):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(torch.randn(4, 3, 12, 12)), torch.tensor([0, 1, 2, 3])).backward()
            optimiser.step()
    assert list(dict(model.named_parameters())) and set(model.state_dict()) == set(
        models.create_model("ds_resnet", 7, width=0.25).state_dict()
    )
    for name, parameter in model.named_parameters():
        if name in weights:
            gone = weights[name].abs() < threshold
            assert not parameter[gone].any() and not torch.equal(parameter[~gone], weights[name][~gone])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Short runs of a network with blocks and of one without."""
    folder = tmp_path_factory.mktemp("runs")
    common = ["--dataset", write_tiny(folder / "tiny.npz", size=32), "-b", "16", "--amp-dtype", "fp32", "--steps", "20"]
    assert status_of([*common, "--model-option", "width=0.5", "--output", folder / "blocks"]) == 0
    assert status_of([*common, "--model", "small_filters_cnn", "--output", folder / "plain"]) == 0
    return folder


def compressed(*arguments):
    return status_of(arguments, compress.main, "python -m fastcifar.compress")


@ONNX
@pytest.mark.parametrize("method", compress.METHODS)
def test_the_command_measures_and_stores(runs, tmp_path, capsys, method):
    run = runs / ("blocks" if method == "channels" else "plain")
    extra = [] if method == "int8" else ["--fine-tune", 3]
    assert compressed("--checkpoint", run, "--method", method, "--output", tmp_path / "new", *extra) == 0
    result_of(capsys)
    rows = json.loads((tmp_path / "new" / "compress.json").read_text())["rows"]
    assert len(rows) == (2 if method == "int8" else 3) and rows[0]["network"] == "original"
    assert all(row["ms"] > 0 and 0 <= row["accuracy"] <= 100 for row in rows)
    before, after = rows[0], rows[-1]
    if method == "int8":
        assert "int8" in after["network"] and abs(after["accuracy"] - before["accuracy"]) <= 10
        return
    smaller = after["parameters"] < before["parameters"]
    assert smaller == (method == "channels") and after["nonzero"] < before["nonzero"]
    assert after["compressed"] < before["compressed"]
    # The new network is a run: other commands find it.
    assert status_of(["--checkpoint", tmp_path / "new", "--amp-dtype", "fp32"], evaluate.main) == 0
    result = result_of(capsys)
    assert result["step"] == 23 and result["accuracy"] == after["accuracy"]
    assert compressed("--checkpoint", run, "--method", method, "--output", tmp_path / "new") == 2
    assert "already holds a run" in capsys.readouterr().err


@ONNX
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "chanels"], "did you mean 'channels'"),
        (["--method", "channels", "--amount", "1"], "--amount must lie between 0 and 1"),
        (["--method", "int8", "--fine-tune", "5"], "--fine-tune is for pruning"),
        (["--method", "int8", "--threads", "0"], "--threads ≥ 1"),
        (["--method", "channels"], "has no blocks with inner channels"),
    ],
    ids=["method", "amount", "fine-tune", "threads", "no blocks"],
)
def test_mistakes_are_one_line(runs, capsys, arguments, message):
    assert compressed("--checkpoint", runs / "plain", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
