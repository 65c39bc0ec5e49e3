"""What all command lines share: one line of error with the fix and exit status 2, never a traceback for a mistake."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from fastcifar import validation

USAGE_ERROR, OUT_OF_MEMORY = 2, 5
_LONGEST_MESSAGE = 1000


class UsageError(ValueError):
    """A user's mistake; the message is all that is shown."""


class Parser(argparse.ArgumentParser):
    """An argument parser that names the nearest flag instead of printing its usage."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def error(self, message: str) -> NoReturn:
        """Raises instead of printing the usage."""
        raise UsageError(message)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As in argparse; an unknown flag's error names the nearest known one."""
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            near = validation.nearest_match(unknown[0].split("=")[0], flags)
            hint = f"; did you mean {near}?" if near else " (see --help)"
            raise UsageError(f"unknown argument {unknown[0]!r}{hint}")
        return known


def whole_number(text: str) -> int:
    """An int from a command line; 10_000 and 1e4 are numbers too."""
    try:
        value = float(text.replace("_", ""))
        if value.is_integer():
            return int(value)
    except (ValueError, OverflowError):
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")


def number(text: str) -> float:
    """A float from a command line; 8/255 is a number too."""
    numerator, slash, denominator = text.partition("/")
    try:
        return float(numerator) / float(denominator) if slash else float(text)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def numbers(option: str, text: str) -> list[int]:
    """0-3,7 → [0, 1, 2, 3, 7].

    Raises:
        ValueError: not such a list.
    """
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ValueError(f"{option} must be numbers such as 0-7 or 3,14,15, got {text!r}")
        found += range(int(first), int(last if dash else first) + 1)
    if not found:
        raise ValueError(f"{option} {text!r} names no number")
    return found


def run(name: str, main: Callable[[Sequence[str]], int], arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs `main(arguments)` and exits with its status.

    A `ValueError` or `OSError` becomes one line and status 2, a lack of memory one line and status 5.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        status = main(arguments)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        from fastcifar.training import memory

        lacks_memory = memory.is_out_of_memory(error)
        if "--debug" in arguments or not (lacks_memory or isinstance(error, (ValueError, OSError))):
            raise
        message = _one_line(str(error)) or type(error).__name__
        if lacks_memory:
            message = f"out of memory ({message}); use a smaller --batch-size, network or data set"
        print(f"{name}: error: {message}", file=sys.stderr)
        status = OUT_OF_MEMORY if lacks_memory else USAGE_ERROR
    except KeyboardInterrupt:
        status = 130
    sys.exit(status)


def _one_line(text: str) -> str:
    """Without line breaks and what a terminal would obey: the message may quote a file from anywhere."""
    text = "".join(character if character.isprintable() else " " for character in text)
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST_MESSAGE else text[:_LONGEST_MESSAGE] + "…"
