"""System calls that fail, or after which nothing happens any more, at a chosen place."""

from __future__ import annotations

import errno
import os

# All calls by which the package changes the disk.
CALLS = ("open", "write", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir")


class Killed(BaseException):
    """The process is gone: nothing that it still tries has an effect."""


class Faults:
    """Context in which the n-th (from 0) of the `CALLS` goes wrong.

    Args:
        monkeypatch: of pytest.
        place: n; None only counts.
        mode: "once" the call fails; "onwards" so do all later ones; "killed" they have no effect any more, as if the
            process had died; "power cut" moreover the files that were not flushed lose their content.
        number: of the error.
    """

    def __init__(self, monkeypatch, place=None, mode="once", number=errno.ENOSPC):
        self.place, self.mode, self.number = place, mode, number
        self.done: list[str] = []
        self._monkeypatch = monkeypatch
        self._unflushed: dict[int, int] = {}

    def __enter__(self):
        self._context = self._monkeypatch.context()
        patch = self._context.__enter__()
        for name in CALLS:
            patch.setattr(os, name, self._wrap(name, getattr(os, name)))
        return self

    def __exit__(self, kind, error, traceback):
        self._context.__exit__(None, None, None)
        for copy in self._unflushed.values():
            if self.mode == "power cut":
                os.ftruncate(copy, 0)
            os.close(copy)
        return kind is Killed

    def _wrap(self, name, original):
        def call(*arguments, **keywords):
            here = len(self.done)
            self.done.append(name)
            if self.place is not None and here >= self.place:
                if self.mode in ("killed", "power cut"):
                    raise Killed
                if here == self.place or self.mode == "onwards":
                    raise OSError(self.number, os.strerror(self.number))
            result = original(*arguments, **keywords)
            if name == "write":
                self._unflushed.setdefault(arguments[0], os.dup(arguments[0]))
            elif name == "fsync" and arguments[0] in self._unflushed:
                os.close(self._unflushed.pop(arguments[0]))
            return result

        return call
