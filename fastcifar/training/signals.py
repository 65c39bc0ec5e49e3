"""Signals that ask a run to stop: noted at once, obeyed after the step."""

from __future__ import annotations

import contextlib
import os
import signal
from types import FrameType


class StopRequest:
    """Context in which SIGTERM, SIGINT and SIGUSR1 set `signal` instead of ending the process.

    A second SIGINT ends it at once, as without this.
    """

    _SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for name in self._SIGNALS:
            number = getattr(signal, name, None)
            if number is not None:
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal is not None:
            raise KeyboardInterrupt
        if number == signal.SIGINT:
            with contextlib.suppress(OSError):
                os.write(2, b"\nsaving after this step; once more to stop at once\n")
        self.signal = int(number)
