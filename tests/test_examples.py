"""The examples run as they are, only smaller."""

import json
import pathlib
import runpy

import pytest

EXAMPLES = pathlib.Path(__file__).resolve().parent.parent / "examples"
pytestmark = pytest.mark.usefixtures("one_thread")


def example(name):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def test_every_example_is_here():
    tested = {"fuse_torchvision", "improve_your_gan", "train_on_your_images"}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == tested


def test_fuse_torchvision(capsys):
    try:
        import torchvision  # noqa: F401
    except Exception as error:  # a build of torchvision that does not fit torch raises whatever it meets
        pytest.skip(f"torchvision cannot be imported: {error}")
    example("fuse_torchvision")["main"](["--batch", "2", "--size", "32", "--rounds", "1"])
    output = capsys.readouterr().out
    assert "MobileNetV2: 52 fused, 0 not" in output and "modules changed back" in output
    difference = output.split("in evaluation: ")[1].split()[0]
    assert float(difference) < 1e-4


def test_improve_your_gan(capsys):
    run = example("improve_your_gan")["main"]
    found, plain = run(["--steps", "150"]), run(["--steps", "3", "--plain"])
    assert plain["bright"] > 0.3 > found["bright"] > 0.02
    assert "step 150: discriminator" in capsys.readouterr().out


def test_train_on_your_images(tmp_path, capsys):
    pytest.importorskip("PIL")
    arguments = ["--output", str(tmp_path / "run"), "--steps", "40", "--images", "40"]
    found = example("train_on_your_images")["main"](arguments)
    assert set(found) == {"cross", "disc", "square"} and sum(found.values()) == pytest.approx(1, abs=1e-5)
    result = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert result["images"] == 60 and result["accuracy"] > 50
    assert "0000.png: cross" in capsys.readouterr().out
    assert example("train_on_your_images")["main"](arguments) == found
