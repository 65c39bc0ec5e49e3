"""Every form of the CIFAR sets gives the same arrays; own folders and .npz files too."""

import cifar_files
import numpy
import pytest

from fastcifar import data
from fastcifar.data import cifar

FORMS = ["python folder", "python archive", "binary folder", "binary archive"]


def write(form, root):
    kind, container = form.split()
    files = cifar_files.python_files() if kind == "python" else cifar_files.binary_files()
    if container == "folder":
        return cifar_files.write_folder(root / f"cifar-100-{kind}", files)
    members = [(f"cifar-100-{kind}/{name}", content) for name, content in files.items()]
    return cifar_files.write_archive(root / f"cifar-100-{kind}.tar.gz", members)


@pytest.mark.parametrize("form", FORMS)
def test_each_form_gives_the_same_arrays(form, tmp_path):
    place = write(form, tmp_path)
    assert cifar.locate("cifar100", tmp_path) == place
    read = cifar.read("cifar100", place, verify=False)
    for split, images, labels in (
        ("train", read.train_images, read.train_labels),
        ("test", read.test_images, read.test_labels),
    ):
        assert images.dtype == numpy.uint8 and images.flags.c_contiguous
        assert (images.transpose(0, 3, 1, 2).reshape(-1, 3072) == cifar_files.PIXELS[split]).all()
        assert labels.tolist() == cifar_files.LABELS[split] and labels.dtype == numpy.int64
    assert read.class_names == tuple(name.decode() for name in cifar_files.FINE)


@pytest.mark.parametrize("form", FORMS)
def test_what_was_not_published_is_refused(form, tmp_path):
    place = write(form, tmp_path)
    with pytest.raises(data.DataError, match="MD5|must be"):
        cifar.read("cifar100", place)


@pytest.mark.parametrize(
    ("name", "classes", "mean", "std"),
    [
        ("cifar100", ("apple", "worm"), (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
        ("cifar10", ("airplane", "truck"), (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    ],
    ids=["cifar100", "cifar10"],
)
def test_real_sets(name, classes, mean, std, cifar_folder):
    place = data.locate_dataset(name, cifar_folder)
    if place is None:
        pytest.skip(f"{cifar_folder} holds no {name}")
    read = data.load_dataset(name, cifar_folder, download=False)
    assert read.train_images.shape == (50_000, 32, 32, 3) and read.test_images.shape == (10_000, 32, 32, 3)
    assert (read.class_names[0], read.class_names[-1]) == classes
    for labels, total in ((read.train_labels, 50_000), (read.test_labels, 10_000)):
        assert (numpy.bincount(labels) == total // read.num_classes).all()
    assert read.mean == pytest.approx(mean, abs=6e-5) and read.std == pytest.approx(std, abs=6e-5)


def test_moments_are_exact(tmp_path):
    images = numpy.random.default_rng(0).integers(0, 256, (2100, 3, 5, 3), dtype=numpy.uint8)
    numpy.savez(tmp_path / "a.npz", **{**arrays(), "train_images": images, "train_labels": numpy.zeros(2100, int)})
    read = data.load_dataset(f"npz:{tmp_path}/a.npz")
    exact = images.reshape(-1, 3) / 255
    assert read.mean == pytest.approx(exact.mean(0), abs=1e-12)
    assert read.std == pytest.approx(exact.std(0), abs=1e-12)


def test_the_folder_itself_may_be_given(tmp_path):
    place = write("python folder", tmp_path)
    assert cifar.locate("cifar100", place) == place


def test_a_named_set_that_is_missing_says_how_to_get_it(tmp_path):
    with pytest.raises(data.DataError, match="cifar-100-python.tar.gz from https://"):
        data.load_dataset("cifar100", tmp_path, download=False)
    with pytest.raises(data.DataError, match="does not exist"):
        data.load_dataset("cifar10", tmp_path / "absent")


def test_auto_offline_is_synthetic_and_says_so(tmp_path):
    found = data.load_dataset("auto", tmp_path, download=False)
    assert found.synthetic and "SYNTHETIC" in found.notices[0]


def test_unknown_names_get_the_nearest():
    with pytest.raises(data.DataError, match="did you mean 'cifar100'"):
        data.load_dataset("cifar-100")
    with pytest.raises(data.DataError, match="needs a path"):
        data.load_dataset("folder:")


def write_images(root, sizes=((32, 32),), classes=("cat", "dog"), splits=("train", "val")):
    image = pytest.importorskip("PIL.Image")
    for split in splits:
        for number, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for index, size in enumerate(sizes):
                image.new("RGB", size, (number * 100, index * 50, 7)).save(root / split / name / f"{index}.png")


def test_a_folder_of_class_folders(tmp_path):
    write_images(tmp_path, sizes=((32, 32), (64, 48), (16, 16)))
    read = data.load_dataset(f"folder:{tmp_path}")
    assert read.class_names == ("cat", "dog") and read.train_images.shape == (6, 32, 32, 3)
    assert read.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert (read.train_images[4] == (100, 50, 7)).all()
    assert "2 other sizes were resized" in read.notices[0]


def test_folders_that_do_not_fit(tmp_path):
    with pytest.raises(data.DataError, match="must hold the folders train/ and test/"):
        data.load_dataset(f"folder:{tmp_path}")
    write_images(tmp_path, splits=("train",))
    write_images(tmp_path, splits=("test",), classes=("cat", "cow"))
    with pytest.raises(data.DataError, match="same classes .*'cow', 'dog'"):
        data.load_dataset(f"folder:{tmp_path}")


def test_a_broken_image_is_named(tmp_path):
    write_images(tmp_path)
    (tmp_path / "train" / "cat" / "0.png").write_bytes(b"no image")
    with pytest.raises(data.DataError, match=r"cat/0\.png: cannot be read"):
        data.load_dataset(f"folder:{tmp_path}")


def test_an_empty_class_is_named_and_hidden_folders_are_none(tmp_path):
    write_images(tmp_path)
    (tmp_path / "train" / ".ipynb_checkpoints").mkdir()
    assert data.load_dataset(f"folder:{tmp_path}").class_names == ("cat", "dog")
    (tmp_path / "train" / "dog" / "0.png").rename(tmp_path / "train" / "dog" / "0.heic")
    with pytest.raises(data.DataError, match="train/dog/ holds no images"):
        data.load_dataset(f"folder:{tmp_path}")
    (tmp_path / "train" / "dog" / "0.heic").rename(tmp_path / "train" / "dog" / "0.png")
    (tmp_path / "val" / "dog" / "0.png").unlink()  # none to judge by
    assert data.load_dataset(f"folder:{tmp_path}").test_labels.tolist() == [0]


def test_sixteen_bits_become_eight(tmp_path):
    image = pytest.importorskip("PIL.Image")
    write_images(tmp_path)
    ramp = numpy.linspace(0, 65535, 32 * 32).round().astype(numpy.uint16).reshape(32, 32)
    image.fromarray(ramp).save(tmp_path / "train" / "cat" / "0.png")
    read = data.load_dataset(f"folder:{tmp_path}").train_images[0]
    assert (abs(read.astype(float) - ramp[..., None] / 257) <= 1).all()
    image.fromarray(ramp.astype(numpy.float32)).save(tmp_path / "train" / "cat" / "0.tiff")
    with pytest.raises(data.DataError, match="0.tiff: cannot be read as an image .* mode F"):
        data.load_dataset(f"folder:{tmp_path}")


def arrays():
    images = numpy.zeros((4, 9, 9, 3), numpy.uint8)
    labels = numpy.array([0, 1, 2, 1], numpy.uint8)
    return {"train_images": images, "train_labels": labels, "test_images": images[:2], "test_labels": labels[:2]}


def test_npz(tmp_path):
    numpy.savez(tmp_path / "a.npz", **arrays())
    read = data.load_dataset(f"npz:{tmp_path}/a.npz")
    assert read.num_classes == 3 and read.train_labels.dtype == numpy.int64
    numpy.savez(tmp_path / "b.npz", **arrays(), class_names=numpy.array(["x", "y", "z", "w"]))
    assert data.load_dataset(f"npz:{tmp_path}/b.npz").class_names == ("x", "y", "z", "w")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_labels": numpy.array([0.5, 1, 2, 3])}, "train_labels must be integers"),
        ({"train_labels": numpy.array([0, 1])}, "4 images but labels"),
        ({"train_labels": numpy.array([0, 1, -2, 3])}, r"must lie in \[0"),
        ({"test_images": numpy.zeros((2, 9, 9), numpy.uint8)}, r"uint8 of shape \(N, H, W, 3\)"),
        ({"test_images": numpy.zeros((0, 9, 9, 3), numpy.uint8), "test_labels": numpy.zeros(0, int)}, "no images"),
        ({"train_images": numpy.array([object()])}, "cannot be read"),
    ],
    ids=["float labels", "fewer labels", "negative label", "grey images", "empty", "objects"],
)
def test_npz_that_does_not_fit(tmp_path, change, message):
    numpy.savez(tmp_path / "a.npz", **{**arrays(), **change})
    with pytest.raises(data.DataError, match=message):
        data.load_dataset(f"npz:{tmp_path}/a.npz")


def test_npz_that_lacks_an_array(tmp_path):
    numpy.savez(tmp_path / "a.npz", train_images=arrays()["train_images"])
    with pytest.raises(data.DataError, match="lacks train_labels, test_images, test_labels"):
        data.load_dataset(f"npz:{tmp_path}/a.npz")


def test_an_array_alone_is_no_npz(tmp_path):
    with open(tmp_path / "a.npz", "wb") as file:
        numpy.save(file, numpy.zeros(3))
    with pytest.raises(data.DataError, match="cannot be read"):
        data.load_dataset(f"npz:{tmp_path}/a.npz")
