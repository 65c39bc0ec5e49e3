"""Explanations of a classifier's predictions."""

import json

import pytest
import torch
from training_case import TINY, result_of, status_of, write_tiny

from fastcifar import explain, models
from fastcifar.deploy import explanation

pytest.importorskip("captum", reason="explanations need captum: pip install 'fastcifar[explain]'")
pytest.importorskip("matplotlib")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    source = write_tiny(folder / "tiny.npz")
    assert status_of([*TINY, "--dataset", source, "--steps", "40", "--lr", "0.1", "--output", folder / "run"]) == 0
    return folder / "run"


def explained(*arguments):
    return status_of(arguments, explain.main, "python -m fastcifar.explain")


def test_a_picture_and_what_it_shows(run, tmp_path, capsys):
    from PIL import Image

    assert explained("--checkpoint", run, "--images", "0-4,9", "--output", tmp_path / "six.png") == 0
    result = result_of(capsys)
    assert [image["number"] for image in result["images"]] == [0, 1, 2, 3, 4, 9]
    assert [image["true"] for image in result["images"]] == [f"class {i}" for i in (0, 1, 2, 3, 4, 4)]
    assert json.loads((tmp_path / "six.json").read_text()) == result
    picture = Image.open(tmp_path / "six.png").convert("RGB")
    assert min(picture.size) > 300 and len(picture.getcolors(picture.width * picture.height)) > 100


def test_where_the_class_is_decides():
    """A network that reads one quarter of the image is explained by that quarter, in both ways."""

    class Corner(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 2, 3, padding=1)

        def forward(self, x):
            return self.conv(x)[:, :, :6, 6:].relu().mean((2, 3))

    torch.manual_seed(0)
    images = torch.randn(4, 3, 12, 12)
    found = explanation.explain(Corner(), images)
    assert found.layer == "conv" and found.grad_cam.shape == (4, 12, 12)
    strength = found.integrated_gradients.abs().sum(1)
    outside = torch.ones(12, 12, dtype=torch.bool)
    outside[:7, 5:] = False
    assert strength[:, outside].max() == 0 and strength[:, ~outside].amax(1).min() > 0
    # The attributions add up to what they explain, up to the integration's 64 steps.
    assert found.incompleteness.max() < 0.05


def test_layers_can_be_chosen():
    torch.manual_seed(0)
    model = models.create_model("ds_resnet", 5, width=0.25).eval()
    images = torch.randn(2, 3, 16, 16)
    assert explanation.explain(model, images).layer == "stages"
    assert explanation.explain(model, images, "stages.0").layer == "stages.0"
    with pytest.raises(ValueError, match="did you mean 'stages.1'"):
        explanation.explain(model, images, "stage.1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--images", "40"], "has 40 test images"), (["--images", "a"], "--images must be numbers"),
     (["--split", "val"], "unknown --split")],
    ids=["number", "text", "split"],
)  # fmt: skip
def test_mistakes_are_one_line(run, capsys, arguments, message):
    assert explained("--checkpoint", run, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
