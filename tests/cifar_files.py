"""Writes small sets in the published CIFAR formats, and evil variants of them."""

import gzip
import io
import pathlib
import pickle
import tarfile

import numpy

FINE = [f"fine_{i}".encode() for i in range(100)]
_GENERATOR = numpy.random.default_rng(1)
PIXELS = {"train": _GENERATOR.integers(0, 256, (20, 3072), dtype=numpy.uint8)}
PIXELS["test"] = _GENERATOR.integers(0, 256, (6, 3072), dtype=numpy.uint8)
LABELS = {split: [int(i * 7 % 100) for i in range(len(pixels))] for split, pixels in PIXELS.items()}


def python_files() -> dict[str, bytes]:
    """The three files of cifar-100-python."""
    files = {}
    for split, pixels in PIXELS.items():
        table = {b"data": pixels, b"fine_labels": LABELS[split], b"coarse_labels": LABELS[split], b"batch_label": b"x"}
        files[split] = pickle.dumps(table, protocol=2)
    files["meta"] = pickle.dumps({b"fine_label_names": FINE, b"coarse_label_names": FINE[:20]}, protocol=2)
    return files


def binary_files() -> dict[str, bytes]:
    """The three files of cifar-100-binary."""
    files = {}
    for split, pixels in PIXELS.items():
        labels = numpy.array(LABELS[split], numpy.uint8)[:, None]
        files[f"{split}.bin"] = numpy.concatenate([labels // 5, labels, pixels], 1).tobytes()
    files["fine_label_names.txt"] = b"\n".join(FINE) + b"\n"
    return files


def write_folder(folder: pathlib.Path, files: dict[str, bytes]) -> pathlib.Path:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def write_archive(path: pathlib.Path, members: list[tuple[tarfile.TarInfo | str, bytes]]) -> pathlib.Path:
    with tarfile.open(path, "w:gz") as tar:
        for member, content in members:
            if isinstance(member, str):
                member = tarfile.TarInfo(member)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def huge_header(path: pathlib.Path, name: str, size: int, kind: bytes) -> pathlib.Path:
    """An archive whose first member claims `size` bytes and has none."""
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    with gzip.open(path, "wb") as file:
        file.write(member.tobuf(tarfile.GNU_FORMAT))
    return path
