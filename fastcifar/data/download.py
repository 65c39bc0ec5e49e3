"""Verified download: https only, size-limited, one process at a time, resumed where it broke off, whole or absent."""

from __future__ import annotations

import contextlib
import os
import pathlib
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Collection, Iterator
from typing import Any

from fastcifar.data.archive import hash_of
from fastcifar.data.dataset import DataError

_BLOCK = 2**20


class _Redirects(urllib.request.HTTPRedirectHandler):
    def __init__(self, schemes: Collection[str]):
        self.schemes = schemes

    def redirect_request(self, request, file, code, message, headers, url):  # noqa: D102
        _check_scheme(url, self.schemes)
        return super().redirect_request(request, file, code, message, headers, url)


def _check_scheme(url: str, schemes: Collection[str]) -> None:
    if urllib.parse.urlsplit(url).scheme not in schemes:
        raise DataError(f"refused to download {url}: only {' or '.join(schemes)} is allowed")


def cache_folder() -> pathlib.Path:
    """$FASTCIFAR_CACHE, else ~/.cache/fastcifar: for weights of metrics and statistics; it may not exist yet."""
    return pathlib.Path(os.environ.get("FASTCIFAR_CACHE") or "~/.cache/fastcifar").expanduser()


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
    """Waits for other processes that download the same file; the lock ends with its process."""
    try:
        import fcntl
    except ImportError:  # Windows: two downloads at once then only waste time, as each replaces the whole file
        yield
        return
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def download(
    url: str,
    target: pathlib.Path,
    *,
    md5: str = "",
    sha256: str = "",
    size_limit: int,
    notify: Callable[[str], None] = print,
    schemes: Collection[str] = ("https",),
    timeout: float = 20.0,
) -> pathlib.Path:
    """Fetches `url` to `target` unless a file with that hash is there.

    Args:
        url: of the file.
        target: appears only when complete and verified; until then the bytes wait beside it as `….part`.
        md5, sha256: one of them, as published, in hexadecimal; all digits, or the first ones where no more are known.
        size_limit: in bytes; a longer answer is refused.
        notify: told what happens.
        schemes: allowed for the url and all it redirects to.
        timeout: for the connection and each block, in seconds.

    Raises:
        DataError: no connection, another hash, too large; a `.part` that can be resumed stays.
    """
    _check_scheme(url, schemes)
    algorithm, expected = ("sha256", sha256) if sha256 else ("md5", md5)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    with _locked(target.with_name(target.name + ".lock")):
        if target.is_file() and _agrees(hash_of(target, algorithm), expected):
            return target
        notify(f"downloading {url} to {target}")
        try:
            _fetch(url, part, size_limit, _Redirects(schemes), timeout)
        except (OSError, ValueError) as error:
            if isinstance(error, DataError):
                part.unlink(missing_ok=True)
                raise
            reason = " ".join(str(getattr(error, "reason", error)).split())
            raise DataError(f"cannot download {url} ({reason}); fetch it by hand to {target}") from error
        found = hash_of(part, algorithm)
        if not _agrees(found, expected):
            part.unlink()
            raise DataError(f"{url} has {algorithm.upper()} {found}, not the published {expected}; nothing was kept")
        os.replace(part, target)
    return target


def _agrees(found: str, expected: str) -> bool:
    return bool(expected) and found.startswith(expected)


def _fetch(url: str, part: pathlib.Path, size_limit: int, redirects: Any, timeout: float) -> None:
    opener = urllib.request.build_opener(redirects)
    have = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "fastcifar"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        response = opener.open(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        if have and error.code == 416:  # the part is complete already, or longer than the file
            return
        raise
    with response:
        resumed = response.status == 206
        length = response.headers.get("Content-Length")
        expected = (have if resumed else 0) + int(length) if length and length.isdigit() else None
        if expected is not None and expected > size_limit:
            raise DataError(f"{url} is {expected} bytes long, more than the {size_limit} that are allowed")
        with open(part, "ab" if resumed else "wb") as file:
            while block := response.read(_BLOCK):
                file.write(block)
                if file.tell() > size_limit:
                    raise DataError(f"{url} sends more than the {size_limit} bytes that are allowed")
            file.flush()
            os.fsync(file.fileno())
        if expected is not None and part.stat().st_size < expected:
            raise OSError(f"it ended after {part.stat().st_size} of {expected} bytes; the next attempt goes on")
