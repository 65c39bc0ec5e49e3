"""Reads the CIFAR batches, which are pickles, without letting a pickle do anything.

Nothing of NumPy's own unpickling runs: the four names that these files need are answered by small classes of this
module, which accept a flat array of bytes and refuse everything else.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import reprlib
from collections.abc import Callable
from typing import Any

import numpy

from fastcifar.data.dataset import DataError


class Function:
    """A function that a pickle may call, and do nothing else with: an ordinary one has attributes that can be set."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]):
        self._call = call

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)

    def __setstate__(self, state: Any) -> None:
        """Refuses."""
        raise pickle.UnpicklingError("a state for a function")


class _Type:
    """Stands for numpy.dtype("uint8")."""

    def __init__(self, name: Any, *flags: Any):
        text = name.decode("ascii", "replace") if isinstance(name, bytes) else name
        if text not in ("u1", "|u1", "uint8"):
            raise pickle.UnpicklingError(f"an array of dtype {reprlib.repr(text)}")

    def __setstate__(self, state: Any) -> None:
        """The byte order, which a byte does not have."""


class _Array:
    """Stands for numpy.ndarray; `values` holds the array once the pickle has given it."""

    values: numpy.ndarray

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, fortran, raw = state
        if not isinstance(kind, _Type) or not isinstance(raw, bytes) or fortran:
            raise pickle.UnpicklingError("an array that is not plain bytes")
        if not all(isinstance(n, int) and n >= 0 for n in shape) or math.prod(shape) != len(raw):
            raise pickle.UnpicklingError(f"an array of shape {reprlib.repr(shape)} with {len(raw)} bytes")
        self.values = numpy.frombuffer(raw, numpy.uint8).reshape(shape)


def _reconstruct(kind: Any, shape: Any, code: Any) -> _Array:
    return _Array()


def _encode(text: Any, encoding: Any) -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"bytes encoded as {reprlib.repr(encoding)}")
    return text.encode("latin-1")


_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): Function(_reconstruct),
    ("numpy._core.multiarray", "_reconstruct"): Function(_reconstruct),
    ("numpy", "ndarray"): "numpy.ndarray",  # only ever an argument of _reconstruct
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): Function(_encode),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"the name {module}.{name}")
        return _ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("a persistent id")


def check_memo(stream: io.BytesIO) -> None:
    """Reads over the opcodes of one pickle, running none; the stream is left where it was.

    Raises:
        pickle.UnpicklingError: a number in the memo beyond what the pickle's length can need: the unpickler would
            allocate a table up to it.
        ValueError: it is no pickle.
    """
    begin = stream.tell()
    limit = len(stream.getbuffer())
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument) > limit:
            raise pickle.UnpicklingError(f"the number {argument} in its memo")
    stream.seek(begin)


def read_table(content: bytes, source: str, *, known: bool = False) -> dict[str, Any]:
    """A pickled dict with text keys, whose arrays become uint8 NumPy arrays.

    Args:
        content: the file.
        source: its name, for errors.
        known: its hash is a published one, so that nothing in it needs to be looked for.

    Raises:
        DataError: anything but a dict of the kinds that CIFAR's files hold. Nothing of it has been run.
    """
    try:
        if not known:
            check_memo(io.BytesIO(content))
        table = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except (Exception, MemoryError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{source}: refused, not a CIFAR batch: it holds {reason}") from error
    if not isinstance(table, dict):
        raise DataError(f"{source}: refused, not a CIFAR batch: it holds a {type(table).__name__}, not a table")
    result = {}
    for key, value in table.items():
        text = key.decode("latin-1") if isinstance(key, bytes) else str(key)
        result[text] = getattr(value, "values", None) if isinstance(value, _Array) else value
    return result
