"""Your own images: a folder of class folders, or an .npz file."""

from __future__ import annotations

import pathlib
import zipfile
import zlib

import numpy

from fastcifar.data.dataset import DataError, ImageDataset

_SIDE = 32
_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".tif", ".tiff")


def read_folder(path: pathlib.Path) -> ImageDataset:
    """`PATH/train/CLASS/*.png` and `PATH/test/CLASS/*.png` (or `val`); other sizes are resized to 32×32.

    Raises:
        DataError: folders are missing, empty or differ in their classes, or an image cannot be read.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(f"folder:{path}: needs Pillow ({error}); run `pip install Pillow`") from error
    train = path / "train"
    test = next((path / name for name in ("test", "val") if (path / name).is_dir()), None)
    if not train.is_dir() or test is None:
        raise DataError(f"folder:{path}: must hold the folders train/ and test/ (or val/), each with a folder a class")
    names, others = (
        sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")) for root in (train, test)
    )
    if names != others or not names:
        odd = sorted(set(names) ^ set(others))[:3]
        raise DataError(f"folder:{path}: train/ and {test.name}/ must hold the same classes (differ in: {odd})")
    arrays, sizes = [], set()
    for root in (train, test):
        images, labels = [], []
        for label, name in enumerate(names):
            before = len(images)
            for file in sorted((root / name).iterdir()):
                if file.suffix.lower() in _SUFFIXES:
                    image, size = _read_image(Image, file)
                    images.append(image)
                    labels.append(label)
                    sizes.add(size)
            if len(images) == before and root == train:
                raise DataError(f"folder:{path}: {root.name}/{name}/ holds no images ({', '.join(_SUFFIXES)})")
        if not images:
            raise DataError(f"folder:{path}: {root.name}/ holds no images ({', '.join(_SUFFIXES)})")
        arrays += [numpy.stack(images), numpy.array(labels, numpy.int64)]
    odd_sizes = sizes - {(_SIDE, _SIDE)}
    notices = (f"images of {len(odd_sizes)} other sizes were resized to {_SIDE}×{_SIDE}",) if odd_sizes else ()
    return ImageDataset(f"folder:{path}", *arrays, tuple(names), source=str(path), notices=notices)


def _eight_bits(pillow, opened):
    """Pillow would cut the values of deeper images off at 255."""
    if opened.mode.startswith("I;16") or (opened.mode == "I" and opened.format == "PNG"):  # the latter before 10.3
        return pillow.fromarray((numpy.asarray(opened).astype(numpy.uint32) // 257).astype(numpy.uint8))
    if opened.mode in ("I", "F"):
        raise ValueError(f"its pixels are of mode {opened.mode}, whose range is not known; convert it to 8 bits")
    return opened


def _read_image(pillow, file: pathlib.Path) -> tuple[numpy.ndarray, tuple[int, int]]:
    try:
        with pillow.open(file) as opened:
            size = opened.size
            image = _eight_bits(pillow, opened).convert("RGB")
            if size != (_SIDE, _SIDE):
                image = image.resize((_SIDE, _SIDE), pillow.Resampling.BOX if min(size) > _SIDE else None)
            return numpy.asarray(image, numpy.uint8), size
    except Exception as error:  # Pillow's decoders raise whatever they meet
        raise DataError(f"{file}: cannot be read as an image ({error}); repair or remove it") from error


def read_npz(path: pathlib.Path) -> ImageDataset:
    """An .npz with train_images, test_images (uint8 [N, H, W, 3]), train_labels, test_labels (integers [N]) and
    optionally class_names (texts).

    Raises:
        DataError: the file or one of its arrays is missing, of another kind, or pickled.
    """
    try:
        with numpy.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, TypeError, AttributeError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise DataError(f"npz:{path}: cannot be read ({error}); write it with numpy.savez") from error
    wanted = ("train_images", "train_labels", "test_images", "test_labels")
    missing = [name for name in wanted if name not in arrays]
    if missing:
        raise DataError(f"npz:{path}: lacks {', '.join(missing)} (it holds: {', '.join(arrays) or 'nothing'})")
    for name in ("train_labels", "test_labels"):
        if arrays[name].dtype.kind not in "iu":
            raise DataError(f"npz:{path}: {name} must be integers, got {arrays[name].dtype}")
        arrays[name] = arrays[name].astype(numpy.int64)
    if "class_names" in arrays:
        names = tuple(str(name) for name in numpy.atleast_1d(arrays["class_names"]))
    else:
        highest = max((int(arrays[name].max()) for name in wanted if "labels" in name and arrays[name].size), default=0)
        names = tuple(f"class {label}" for label in range(highest + 1))
    return ImageDataset(f"npz:{path}", *(arrays[name] for name in wanted), names, source=str(path))
