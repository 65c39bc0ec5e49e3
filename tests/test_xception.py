"""Xception on timm: its count, its input, its weights from a file; what is missing is said in one line."""

import importlib

import pytest
import safetensors.torch
import torch
from test_training import make
from training_case import status_of, write_tiny

from fastcifar import data, models
from fastcifar.data import DataError
from fastcifar.models import xception
from fastcifar.training import transfer


@pytest.fixture
def timm():
    try:
        return importlib.import_module("timm")
    except Exception as error:
        pytest.skip(f"needs timm, which cannot be imported ({error})")


def test_count_is_the_published_one(timm):
    with torch.device("meta"):
        model = models.create_model("xception", 100)
    assert models.count_parameters(model, "keras") == 21_961_868
    assert models.count_parameters(model.backbone, "keras") == 20_861_480


@pytest.fixture
def network(timm):
    torch.manual_seed(0)
    return models.create_model("xception", 7, hidden=5).eval()


def test_the_backbone_sees_what_it_was_trained_on(network):
    """71 × 71 pixels in [−1, 1], whatever the normalisation of the images that come."""
    seen = []
    network.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    pixels = torch.rand(2, 3, 32, 32)
    mean, std = (0.5, 0.45, 0.4), (0.27, 0.25, 0.2)
    network.normalised_by(mean, std)
    normalised = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        assert network(normalised).shape == (2, 7)
    expected = torch.nn.functional.interpolate(2 * pixels - 1, (71, 71), mode="bilinear")
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-5)


def test_weights_under_timms_names(network, timm, tmp_path):
    torch.manual_seed(1)
    source = timm.create_model("legacy_xception", num_classes=3).state_dict()
    safetensors.torch.save_file(source, tmp_path / "weights.safetensors")
    tensors = transfer.read_backbone(str(tmp_path / "weights.safetensors"), "xception")
    transfer.load_backbone(network, tensors, "weights")
    loaded = network.backbone.state_dict()
    assert loaded.keys() == {name for name in source if not name.startswith("fc.")}
    assert all(torch.equal(tensor, source[name]) for name, tensor in loaded.items())


def test_the_published_weights_are_asked_for_by_name(monkeypatch, tmp_path, timm):
    asked = []

    def download(url, target, **options):
        asked.append((url, target.name, options["sha256"]))
        raise DataError(f"cannot download {url} (no network); fetch it by hand to {target}")

    monkeypatch.setattr(xception, "download", download)
    with pytest.raises(
        ValueError, match="fetch it by hand to .*xception-43020ad28.pth, or give a copy .*--backbone FILE"
    ):
        transfer.read_backbone("imagenet", "xception")
    ((url, name, digest),) = asked
    assert url == timm.models.get_pretrained_cfg("legacy_xception").url and name in url and digest in name


def test_without_timm_one_line_says_so(monkeypatch, tmp_path, capsys):
    original = importlib.import_module

    def import_module(name, *arguments):
        if name == "timm":
            raise ImportError("No module named 'timm'")
        return original(name, *arguments)

    monkeypatch.setattr(xception.importlib, "import_module", import_module)
    monkeypatch.chdir(tmp_path)
    assert status_of(["--preset", "xception-transfer", "--dataset", write_tiny(tmp_path / "tiny.npz")]) == 2
    message = capsys.readouterr().err
    assert "run `pip install 'fastcifar[xception]'`" in message and len(message.splitlines()) == 1


def test_two_phases(timm, tmp_path):
    tiny = data.load_dataset(write_tiny(tmp_path / "tiny.npz"))
    options = {"size": 33, "hidden": 4}
    task = make(tiny, model="xception", model_options=options, backbone="none", batch_size=4, steps=4)
    first = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    for step, phase in enumerate(("frozen", "trained"), start=1):
        task.train_step(step)
        moved = {name.split(".")[0] for name, t in task.model.state_dict().items() if not torch.equal(t, first[name])}
        assert moved == {"head"} if phase == "frozen" else {"head", "backbone"}
    assert [task.learning_rate(step) for step in range(4)] == pytest.approx([2e-4, 2e-4, 5e-6, 2e-6])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"size": 32}, "size must be an int ≥ 33"), ({"hidden": 0}, "hidden must be"), ({"dropout": 1.0}, r"\[0, 1\)")],
    ids=["size", "hidden", "dropout"],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        models.create_model("xception", **options)
