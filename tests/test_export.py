"""Exported programs compute what the network does, for any batch size; those that do not are refused."""

import importlib.util
import json

import pytest
import torch
from training_case import TINY, result_of, status_of, write_tiny

from fastcifar import data, export, models, validation
from fastcifar.deploy import programs
from fastcifar.training import trained

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"),
]
ONNX = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="ONNX needs onnx, onnxscript and onnxruntime: pip install 'fastcifar[export]'",
)
FORMATS = [pytest.param("onnx", marks=ONNX), "torch"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Short runs of a classifier and of a conditional GAN."""
    folder = tmp_path_factory.mktemp("runs")
    source = write_tiny(folder / "tiny.npz", size=32)
    assert status_of([*TINY, "--dataset", source, "--steps", "3", "--output", folder / "classifier"]) == 0
    gan = ["--model", "aw_sngan", "--model-option", "width=4", "--model-option", "discriminator_width=2"]
    common = ["--dataset", source, "-b", "8", "--amp-dtype", "fp32", "--steps", "1", "--eval-every", "0"]
    assert status_of([*gan, *common, "--output", folder / "gan"]) == 0
    return folder


def exported(*arguments):
    return status_of(arguments, export.main, "python -m fastcifar.export")


@pytest.mark.parametrize("kind", FORMATS)
def test_a_classifier(runs, tmp_path, capsys, record_property, kind):
    path = tmp_path / f"network{programs.FORMATS[kind]}"
    assert exported("--checkpoint", runs / "classifier", "--format", kind, "--output", path) == 0
    result = result_of(capsys)
    assert result["check"]["inputs"] == result["check"]["equal_predictions"] == 40
    record_property("inputs", result["check"]["inputs"])
    assert 0 < result["check"]["max_abs_difference"] < 1e-4 * result["check"]["largest_output"]
    stored = json.loads(path.with_name(f"{path.name}.json").read_text())
    assert stored["class_names"] == [f"class {i}" for i in range(5)] and stored["bytes"] == path.stat().st_size
    program = programs.read(path, kind)
    model, _, dataset, _ = trained.load_classifier(runs / "classifier")
    images, _ = next(data.evaluation_batches(
        dataset.test_images, dataset.test_labels, batch_size=7, mean=dataset.mean, std=dataset.std
    ))  # fmt: skip
    pixels = torch.from_numpy(dataset.test_images[:7]).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        for count in (1, 7):
            torch.testing.assert_close(program(pixels[:count]), model(images[:count]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_generator(runs, tmp_path, capsys, record_property, kind):
    path = tmp_path / f"generator{programs.FORMATS[kind]}"
    assert exported("--checkpoint", runs / "gan", "--format", kind, "--output", path) == 0
    result = result_of(capsys)
    assert result["check"]["inputs"] == 1000 and "labels int64" in result["input"]
    record_property("inputs", result["check"]["inputs"])
    images = programs.read(path, kind)(torch.randn(3, 128), torch.tensor([0, 4, 2]))
    assert images.shape == (3, 3, 32, 32) and images.abs().max() <= 1


def test_the_default_place_is_the_run(runs, capsys):
    assert exported("--checkpoint", runs / "classifier", "--format", "torch") == 0
    assert {"ds_resnet.pt2", "ds_resnet.pt2.json"} <= {path.name for path in (runs / "classifier").iterdir()}


def test_a_program_that_differs_is_refused():
    torch.manual_seed(0)
    model = models.create_model("small_filters_cnn", 5).train()
    images = torch.randn(4, 3, 32, 32)
    figures = programs.compare(model, model, [images], classes=True)
    assert figures["max_abs_difference"] == 0 and figures["equal_predictions"] == 4 and model.training
    for wrong in (lambda x: model(x) + 0.01, lambda x: model(x) * float("nan"), lambda x: model(x.flip(3))):
        with pytest.raises(ValueError, match="differs from the network"):
            programs.compare(wrong, model, [images], classes=True)


def test_a_refused_program_does_not_replace_a_sound_one(runs, tmp_path, capsys, monkeypatch):
    def refuse(*arguments, **options):
        raise ValueError("differs from the network")

    path = tmp_path / "network.pt2"
    path.write_bytes(b"sound")
    monkeypatch.setattr(programs, "compare", refuse)
    assert exported("--checkpoint", runs / "classifier", "--format", "torch", "--output", path) == 2
    assert path.read_bytes() == b"sound" and list(tmp_path.iterdir()) == [path]
    assert "differs from the network" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "tflite"], "unknown --format 'tflite'"),
        (["--format", "onx"], "did you mean 'onnx'"),
        (["--format", "torch", "--checkpoint", "nowhere"], "there is no nowhere"),
    ],
    ids=["format", "misspelt", "no run"],
)
def test_mistakes_are_one_line(runs, capsys, arguments, message):
    assert exported("--checkpoint", runs / "classifier", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'fastcifar\[export\]'"):
        validation.require("export", "onnx")
