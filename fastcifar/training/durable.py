"""Writing that survives a kill, a crash and a full disk: a file or folder is there complete, or not at all."""

from __future__ import annotations

import os
import pathlib


def write(path: pathlib.Path, content: bytes) -> None:
    """Writes a file and flushes it to the disk.

    Raises:
        OSError: as the system says; the file may hold a part.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush(path: pathlib.Path) -> None:
    """Flushes a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: pathlib.Path) -> None:
    """Makes a folder and its parents where they are missing, and flushes the names of those made."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    flush(path.parent)


def replace(path: pathlib.Path, content: bytes) -> None:
    """Replaces a file whole or not at all; after a power cut it may be the old one.

    Raises:
        OSError: as the system says; the old file is untouched.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary, content)
        os.rename(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
