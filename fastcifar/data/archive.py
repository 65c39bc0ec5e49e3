"""Takes wanted files out of an archive in memory: nothing is extracted, no name or link in it is followed."""

from __future__ import annotations

import gzip
import hashlib
import pathlib
import tarfile
import zlib
from collections.abc import Collection
from typing import BinaryIO

from fastcifar.data.dataset import DataError

MEMBER_LIMIT = 256 * 2**20
TOTAL_LIMIT = 512 * 2**20


class _Limited:
    """A readable stream that refuses to give more than `limit` bytes, before it reads them."""

    def __init__(self, stream: BinaryIO, limit: int):
        self.stream, self.left = stream, limit

    def read(self, size: int = -1) -> bytes:
        if size < 0 or size > self.left:
            raise DataError(f"it unpacks to more than {TOTAL_LIMIT >> 20} MiB")
        content = self.stream.read(size)
        self.left -= len(content)
        return content


def hash_of(path: pathlib.Path, algorithm: str = "md5") -> str:
    """MD5 (or "sha256") of a file, in hexadecimal."""
    with open(path, "rb") as file:
        digest = hashlib.new(algorithm, usedforsecurity=False)
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def read_members(path: pathlib.Path, wanted: Collection[str]) -> dict[str, bytes]:
    """The contents of the wanted regular files of a .tar.gz, by their exact names.

    Raises:
        DataError: the archive is damaged, too large, or lacks one of them as a regular file.
    """
    found: dict[str, bytes] = {}
    try:
        with gzip.open(path, "rb") as unzipped, tarfile.open(fileobj=_Limited(unzipped, TOTAL_LIMIT), mode="r|") as tar:
            for member in tar:
                if member.size > MEMBER_LIMIT:
                    raise DataError(f"its member {member.name!r} claims {member.size} bytes")
                if member.name not in wanted or member.name in found:
                    continue
                if not member.isreg():
                    raise DataError(f"its member {member.name!r} is not a regular file")
                file = tar.extractfile(member)
                content = file.read() if file else b""
                if len(content) != member.size:
                    raise DataError(f"its member {member.name!r} is cut short")
                found[member.name] = content
    except DataError as error:
        raise DataError(f"{path}: refused: {error}; delete it and download it again") from error
    except (OSError, EOFError, tarfile.TarError, zlib.error, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: damaged archive ({reason}); delete it and download it again") from error
    missing = sorted(set(wanted) - set(found))
    if missing:
        raise DataError(f"{path}: lacks {missing[0]!r}; delete it and download it again")
    return found
