"""What is measured by training: alternatives with several seeds, halves of a data set, the first steps of a preset."""

import numpy
import pytest
import torch
from training_case import TINY, write_tiny

from benchmarks import first_steps, systems, transfer, trials
from fastcifar import data
from fastcifar.training import recipe


def test_each_alternative_is_trained_once_with_each_seed(tmp_path, monkeypatch):
    source = write_tiny(tmp_path / "tiny.npz")
    command = [*TINY, "--dataset", source, "--steps", "4", "--eval-every", "0"]
    alternatives = {"slow": [*command, "--lr", "0.001"], "fast": [*command, "--lr", "0.1"]}
    rows = trials.compare(tmp_path / "runs", alternatives, seeds=2)
    assert [row["what"] for row in rows] == ["slow", "fast"]
    for row in rows:
        values = [result["test_accuracy"] for result in row["runs"]]
        assert row["test accuracy, %"] == sum(values) / 2 and len(values) == 2
        assert len({result["state_sha256"] for result in row["runs"]}) == 2
    monkeypatch.setattr(trials.train, "main", None)  # all is there: nothing is trained again
    assert trials.compare(tmp_path / "runs", alternatives, seeds=2) == rows
    assert all("runs" not in row for row in trials.printed(rows))


def test_halves_of_a_data_set_share_no_class(tmp_path):
    whole = data.load_dataset(write_tiny(tmp_path / "tiny.npz", classes=4))
    parts = [
        data.load_dataset(transfer.write_half(whole, tmp_path / f"{first}.npz", first, first + 2)) for first in (0, 2)
    ]
    assert [part.class_names for part in parts] == [("class 0", "class 1"), ("class 2", "class 3")]
    for first, part in zip((0, 2), parts, strict=True):
        chosen = whole.train_labels // 2 == first // 2
        assert numpy.array_equal(part.train_images, whole.train_images[chosen])
        assert numpy.array_equal(part.train_labels, whole.train_labels[chosen] - first)
    assert sum(len(part.test_images) for part in parts) == len(whole.test_images)


def test_the_first_steps_of_a_preset(tmp_path):
    source = write_tiny(tmp_path / "tiny.npz")
    flags = {"preset": "resnet_cifar10", "dataset": source, "steps": 3, "batch_size": 10, "amp_dtype": "fp32"}
    flags |= {"model_options": {"widths": (4, 4, 8, 8)}, "tta": True, "cutout": 0}
    row = first_steps.measure(flags, torch.device("cpu"), test_images=20)
    assert (row["steps"], row["whole preset, steps"], row["test images"]) == (3, 30 * 100 // 10, 20)
    assert row["whole preset, hours here"] == row["seconds a step"] * 300 / 3600
    assert "test images" not in first_steps.measure(flags, torch.device("cpu"), test_images=0)
    assert 0 <= row["test accuracy, %"] <= 100 and 0 <= row["with TTA, %"] <= 100
    assert row["peak MiB"] > 0 and recipe.PRESETS["resnet_cifar10"]["epochs"] == 30


def test_runs_of_other_options_are_not_taken_for_these(tmp_path):
    source = write_tiny(tmp_path / "tiny.npz")
    command = [*TINY, "--dataset", source, "--steps", "2", "--eval-every", "0"]
    rows = trials.compare(tmp_path / "runs", {"one": command}, seeds=1)
    with pytest.raises(SystemExit, match="holds a run with other options"):
        trials.compare(tmp_path / "runs", {"one": [*command, "--lr", "0.2"]}, seeds=1)
    assert rows[0]["standard deviation"] is None and systems.spread([rows[0]["test accuracy, %"]]).endswith(" %")


def test_the_whole_of_a_preset_is_as_many_images_whatever_the_batch():
    times = [9.0, 1.0, 1.0, 9.0, 3.0, 3.0]
    chosen = recipe.with_budget(recipe.resolve({"steps": 6, "phases": "1:1:frozen,1:0.5"}, has_gpu=False), 100)
    assert first_steps._seconds(times, chosen) == {False: 3.0, True: 1.0}
    assert first_steps._whole({"preset": "fast", "steps": 3, "batch_size": 32}, 32, 50_000).steps == 160_000
    assert first_steps._whole({"preset": "resnet_cifar10", "batch_size": 128}, 128, 50_000).steps == 11_719
