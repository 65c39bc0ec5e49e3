"""Images held out of the training set."""

import numpy
import pytest
from training_case import TINY, result_of, status_of, write_tiny

from fastcifar import data, evaluate
from fastcifar.data.synthetic import synthetic


def test_each_class_gives_its_share():
    whole = synthetic(seed=0)
    whole = data.ImageDataset(
        "x", whole.train_images[:1000], whole.train_labels[:1000] // 34, whole.test_images, whole.test_labels // 34,
        ("a", "b", "c"), source="x",
    )  # fmt: skip
    split = data.hold_out(whole, 101)
    assert len(split.test_images) == 101 and len(split.train_images) == 899
    for label in range(3):
        wanted = 101 * (whole.train_labels == label).sum() / 1000
        assert abs((split.test_labels == label).sum() - wanted) <= 1
    # No image is lost, none is in both, labels stay with their images.
    pairs = [
        {(label, image.tobytes()) for image, label in zip(images, labels, strict=True)}
        for images, labels in (
            (split.train_images, split.train_labels),
            (split.test_images, split.test_labels),
            (whole.train_images, whole.train_labels),
        )
    ]
    assert pairs[0] | pairs[1] == pairs[2] and not pairs[0] & pairs[1]
    assert (split.mean, split.std) == (whole.mean, whole.std)
    again = data.hold_out(whole, 101)
    assert numpy.array_equal(again.test_images, split.test_images)
    assert data.hold_out(whole, 0) is whole


@pytest.mark.parametrize("count", [-1, 100, 1000])
def test_too_many_are_refused(tmp_path, count):
    whole = data.load_dataset(write_tiny(tmp_path / "tiny.npz"))
    with pytest.raises(data.DataError, match=f"--holdout {count}: must be below the 100 training images"):
        data.hold_out(whole, count)


def test_a_run_says_what_it_was_tested_on(tmp_path, capsys):
    source = write_tiny(tmp_path / "tiny.npz")
    run = [*TINY, "--dataset", source, "--steps", 2, "--holdout", 20, "--output", tmp_path / "run"]
    assert status_of(run) == 0
    result = result_of(capsys)
    assert result["dataset"] == f"{source}-holdout20" and "20 images held out of the 100" in result["notices"][0]
    assert status_of(["--checkpoint", tmp_path / "run"], evaluate.main) == 0
    assert result_of(capsys)["images"] == 40
