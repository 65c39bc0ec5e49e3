"""Finds and reads the data set that a name means."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Iterator

from fastcifar import validation
from fastcifar.data import cifar, folders
from fastcifar.data.dataset import DataError, ImageDataset
from fastcifar.data.download import download as fetch
from fastcifar.data.synthetic import synthetic

_CIFAR = ("cifar100", "cifar10")
_NAMES = ("auto", *_CIFAR, "synthetic", "folder:PATH", "npz:PATH")
_ARCHIVE_LIMIT = 200 * 2**20


def _places(data_dir: str | os.PathLike | None) -> Iterator[pathlib.Path]:
    if data_dir is not None:
        yield pathlib.Path(data_dir)
        return
    if os.environ.get("FASTCIFAR_DATA"):
        yield pathlib.Path(os.environ["FASTCIFAR_DATA"])
    yield pathlib.Path("data")


def locate_dataset(name: str, data_dir: str | os.PathLike | None = None) -> pathlib.Path | None:
    """Where "cifar100" or "cifar10" would be read from: `data_dir`, else $FASTCIFAR_DATA, else ./data; None if nowhere.

    Reads no images and downloads nothing.

    Raises:
        DataError: another name, or a `data_dir` that does not exist.
    """
    if name not in _CIFAR:
        raise DataError(f"only {' and '.join(_CIFAR)} are looked for in a folder, not {name!r}")
    if data_dir is not None and not pathlib.Path(data_dir).exists():
        raise DataError(f"--data-dir {data_dir} does not exist; give the folder that holds the CIFAR files")
    for place in _places(data_dir):
        found = cifar.locate(name, place)
        if found is not None:
            return found
    return None


def load_dataset(
    name: str = "auto",
    data_dir: str | os.PathLike | None = None,
    *,
    download: bool = True,
    seed: int = 0,
    notify: Callable[[str], None] = print,
) -> ImageDataset:
    """Reads a data set.

    Args:
        name: "cifar100", "cifar10", "synthetic", "folder:PATH", "npz:PATH", or "auto": CIFAR-100 from `data_dir`,
            $FASTCIFAR_DATA or ./data, else downloaded, else the synthetic set, which says so in its notices.
        data_dir: folder of the CIFAR archives or of their extracted folders.
        download: fetch a CIFAR set that is not there.
        seed: of the synthetic set.
        notify: told of a download.

    Raises:
        DataError: an unknown name, or a set that is missing or damaged; the message says what to do.
    """
    kind, _, path = name.partition(":")
    if kind in ("folder", "npz"):
        if not path:
            raise DataError(f"--dataset {kind}: needs a path, as in {kind}:images")
        return folders.read_folder(pathlib.Path(path)) if kind == "folder" else folders.read_npz(pathlib.Path(path))
    try:
        validation.choose("data set", name, _NAMES)
    except ValueError as error:
        raise DataError(str(error)) from None
    if name == "synthetic":
        return synthetic(seed=seed)
    wanted = "cifar100" if name == "auto" else name
    place = locate_dataset(wanted, data_dir)
    if place is None and download:
        place = _download(wanted, next(_places(data_dir)), notify, optional=name == "auto")
    if place is not None:
        return cifar.read(wanted, place)
    if name == "auto":
        return synthetic(seed=seed)
    archive = cifar.versions(wanted)[0].archive
    raise DataError(f"{wanted} is not in {next(_places(data_dir))}; put {archive} from {cifar.URL} there")


def _download(name: str, folder: pathlib.Path, notify: Callable[[str], None], *, optional: bool) -> pathlib.Path | None:
    version = cifar.versions(name)[1]
    target = folder / version.archive
    try:
        return fetch(cifar.URL + version.archive, target, md5=version.md5, size_limit=_ARCHIVE_LIMIT, notify=notify)
    except (DataError, OSError) as error:
        if not optional:
            raise DataError(f"{name} is not in {folder}, and {error}") from error
        notify(f"{error}")
        return None
