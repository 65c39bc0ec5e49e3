"""Alternatives of a training with several seeds; the halves of a data set that a transfer is measured on."""

import numpy
from training_case import TINY, write_tiny

from benchmarks import transfer, trials
from fastcifar import data


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
