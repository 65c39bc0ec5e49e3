"""CIFAR-10 and CIFAR-100 from the published archives or their extracted folders, python and binary versions.

Source: Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009; hashes of the archives as published
at https://www.cs.toronto.edu/~kriz/cifar.html.
"""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy

from fastcifar.data import archive, unpickling
from fastcifar.data.dataset import DataError, ImageDataset

_PIXELS = 3 * 32 * 32
URL = "https://www.cs.toronto.edu/~kriz/"


@dataclass(frozen=True)
class Version:
    """One published form: archive name and MD5, the folder in it, and its files with their MD5 (None: not known)."""

    archive: str
    md5: str
    folder: str
    train: dict[str, str | None]
    test: dict[str, str | None]
    names: dict[str, str | None]

    @property
    def files(self) -> dict[str, str | None]:
        """All files that are read."""
        return {**self.train, **self.test, **self.names}


_VERSIONS = {
    "cifar100": (
        Version(
            archive="cifar-100-python.tar.gz",
            md5="eb9058c3a382ffc7106e4002c42a8d85",
            folder="cifar-100-python",
            train={"train": "16019d7e3df5f24257cddd939b257f8d"},
            test={"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
            names={"meta": "7973b15100ade9c7d40fb424638fde48"},
        ),
        Version(
            archive="cifar-100-binary.tar.gz",
            md5="03b5dce01913d631647c71ecec9e9cb8",
            folder="cifar-100-binary",
            train={"train.bin": None},
            test={"test.bin": None},
            names={"fine_label_names.txt": None},
        ),
    ),
    "cifar10": (
        Version(
            archive="cifar-10-python.tar.gz",
            md5="c58f30108f718f92721af3b95e74349a",
            folder="cifar-10-batches-py",
            train={
                "data_batch_1": "c99cafc152244af753f735de768cd75f",
                "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
                "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
                "data_batch_4": "634d18415352ddfa80567beed471001a",
                "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            },
            test={"test_batch": "40351d587109b95175f43aff81a1287e"},
            names={"batches.meta": "5ff9c542aee3614f3951f8cda6e48888"},
        ),
        Version(
            archive="cifar-10-binary.tar.gz",
            md5="c32a1d4ab5d03f1284b67883e8d87530",
            folder="cifar-10-batches-bin",
            train={f"data_batch_{i}.bin": None for i in range(1, 6)},
            test={"test_batch.bin": None},
            names={"batches.meta.txt": None},
        ),
    ),
}
SIZES = {"cifar100": (50_000, 10_000, 100), "cifar10": (50_000, 10_000, 10)}


def versions(name: str) -> tuple[Version, ...]:
    """The published forms of "cifar100" or "cifar10", the python version first."""
    return _VERSIONS[name]


def locate(name: str, folder: pathlib.Path) -> pathlib.Path | None:
    """The folder or archive in (or at) `folder` that holds the set; None when there is none."""
    for version in _VERSIONS[name]:
        for place in (folder / version.folder, folder / version.archive, folder):
            if _matches(version, place):
                return place
    return None


def read(name: str, place: pathlib.Path, *, verify: bool = True) -> ImageDataset:
    """Reads the set from a folder or an archive that `locate` found.

    Args:
        name: "cifar100" or "cifar10".
        place: folder of the files, or the archive.
        verify: compare published hashes and sizes.

    Raises:
        DataError: a file is missing, damaged, or not what was published.
    """
    is_archive = place.is_file()
    version = next((v for v in _VERSIONS[name] if _matches(v, place)), None)
    if version is None:
        archives = " or ".join(v.archive for v in _VERSIONS[name])
        raise DataError(f"{place} holds no {name}; give {archives}, or the folder in it")
    contents = _read_archive(version, place, verify) if is_archive else _read_folder(version, place, verify)
    parse = _parse_pickles if version.folder.endswith(("python", "py")) else _parse_records
    return _assemble(name, version, contents, parse, place, verify)


def _matches(version: Version, place: pathlib.Path) -> bool:
    if place.is_file():
        return place.name == version.archive
    return all((place / file).is_file() for file in version.files)


def _read_archive(version: Version, place: pathlib.Path, verify: bool) -> dict[str, bytes]:
    if verify and (found := archive.hash_of(place)) != version.md5:
        raise DataError(f"{place}: MD5 {found} is not the published {version.md5}; delete it and download it again")
    members = archive.read_members(place, [f"{version.folder}/{file}" for file in version.files])
    return {name.rpartition("/")[2]: content for name, content in members.items()}


def _read_folder(version: Version, place: pathlib.Path, verify: bool) -> dict[str, bytes]:
    contents = {}
    for file, md5 in version.files.items():
        path = place / file
        try:
            if path.stat().st_size > archive.MEMBER_LIMIT:
                raise DataError(f"{path}: {path.stat().st_size} bytes are too many for a CIFAR file")
            contents[file] = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error}); extract {version.archive} again") from error
        found = hashlib.md5(contents[file], usedforsecurity=False).hexdigest()
        if verify and md5 is not None and found != md5:
            raise DataError(f"{path}: MD5 {found} differs from the published {md5}; extract {version.archive} again")
    return contents


def _parse_pickles(content: bytes, source: str, known: bool) -> tuple[numpy.ndarray, numpy.ndarray]:
    table = unpickling.read_table(content, source, known=known)
    pixels = table.get("data")
    labels = table.get("fine_labels", table.get("labels"))
    if not isinstance(pixels, numpy.ndarray) or pixels.ndim != 2 or pixels.shape[1] != _PIXELS:
        raise DataError(f"{source}: its images are not an array of rows of {_PIXELS} bytes")
    if not isinstance(labels, list) or not all(type(label) is int and 0 <= label < 256 for label in labels):
        raise DataError(f"{source}: its labels are not a list of class numbers")
    return pixels, numpy.array(labels, numpy.int64)


def _parse_records(content: bytes, source: str, known: bool) -> tuple[numpy.ndarray, numpy.ndarray]:
    labels = 2 if source.endswith(("train.bin", "test.bin")) else 1  # CIFAR-100 has a coarse label before the fine one
    if len(content) % (_PIXELS + labels):
        raise DataError(f"{source}: {len(content)} bytes are no whole number of images; extract the archive again")
    rows = numpy.frombuffer(content, numpy.uint8).reshape(-1, _PIXELS + labels)
    return rows[:, labels:], rows[:, labels - 1].astype(numpy.int64)


def _class_names(content: bytes, source: str) -> tuple[str, ...]:
    if source.endswith(".txt"):
        return tuple(content.decode("ascii", "replace").split())
    table = unpickling.read_table(content, source)
    names = table.get("fine_label_names", table.get("label_names"))
    if not isinstance(names, list) or not all(isinstance(name, (str, bytes)) for name in names):
        raise DataError(f"{source}: holds no list of class names")
    return tuple(name.decode("ascii", "replace") if isinstance(name, bytes) else name for name in names)


def _assemble(
    name: str,
    version: Version,
    contents: dict[str, bytes],
    parse: Callable[[bytes, str, bool], tuple[numpy.ndarray, numpy.ndarray]],
    place: pathlib.Path,
    verify: bool,
) -> ImageDataset:
    arrays = {}
    for split in ("train", "test"):
        parts = [parse(contents[file], f"{place}/{file}", verify) for file in getattr(version, split)]
        pixels = numpy.concatenate([part[0] for part in parts])
        images = numpy.ascontiguousarray(pixels.reshape(-1, 3, 1024).transpose(0, 2, 1)).reshape(-1, 32, 32, 3)
        arrays[split] = images, numpy.concatenate([part[1] for part in parts])
    (names_file,) = version.names
    names = _class_names(contents[names_file], f"{place}/{names_file}")
    sizes = (len(arrays["train"][0]), len(arrays["test"][0]), len(names))
    if verify and sizes != SIZES[name]:
        raise DataError(f"{place}: holds {sizes} training images, test images and classes, must be {SIZES[name]}")
    return ImageDataset(name, *arrays["train"], *arrays["test"], names, source=str(place))
