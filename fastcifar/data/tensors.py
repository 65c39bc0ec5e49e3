"""Reads named tensors: safetensors, and what torch.save wrote, whose pickle may only name plain tensors.

torch.save wrote a zip archive since torch 1.6 (`data.pkl`, `data/0`, …) and before that a row of pickles with the bytes
behind them; in both the tensors are pickled as calls of a function on storages. Nothing of torch's own unpickling runs:
the names that such a file needs are answered by what stands here, every other name is refused.
"""

from __future__ import annotations

import io
import pickle
import reprlib
import struct
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch

from fastcifar.data.dataset import DataError
from fastcifar.data.unpickling import Function, check_memo

# The first number of a file before torch 1.6, and the version that follows it.
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001


class _Table(dict):
    """Stands for collections.OrderedDict."""

    def __setstate__(self, state: Any) -> None:
        """The versions of the modules, which the tensors do not need."""


class _Storage(NamedTuple):
    dtype: torch.dtype
    key: str
    count: int


class _Strided(NamedTuple):
    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def _numbers(*values: Any) -> bool:
    return all(type(value) is int and value >= 0 for value in values)


def _rebuild(storage: Any, offset: Any, size: Any, stride: Any, *ignored: Any) -> _Strided:
    if not isinstance(storage, _Storage) or not isinstance(size, tuple) or not isinstance(stride, tuple):
        raise pickle.UnpicklingError("a tensor without a plain storage")
    if len(size) != len(stride) or not _numbers(offset, *size, *stride):
        raise pickle.UnpicklingError(f"a tensor of {reprlib.repr({'size': size, 'stride': stride, 'offset': offset})}")
    return _Strided(storage, offset, size, stride)


def _parameter(tensor: Any, *ignored: Any) -> _Strided:
    if not isinstance(tensor, _Strided):
        raise pickle.UnpicklingError("a parameter that is not a tensor")
    return tensor


_ALLOWED = {
    ("collections", "OrderedDict"): _Table,
    ("torch._utils", "_rebuild_tensor_v2"): Function(_rebuild),
    ("torch._utils", "_rebuild_parameter"): Function(_parameter),
    ("torch", "FloatStorage"): torch.float32,
    ("torch", "DoubleStorage"): torch.float64,
    ("torch", "HalfStorage"): torch.float16,
    ("torch", "BFloat16Storage"): torch.bfloat16,
    ("torch", "LongStorage"): torch.int64,
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO):
        check_memo(stream)
        super().__init__(stream)
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"the name {module}.{name}")
        return _ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        # The sixth part, of old files, is the storage that this one is a view of.
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage" or pid[5:] not in ((), (None,)):
            raise pickle.UnpicklingError(f"the persistent id {reprlib.repr(pid)}")
        storage = _Storage(pid[1], pid[2], pid[4])
        if not isinstance(storage.dtype, torch.dtype) or type(storage.key) is not str or not _numbers(storage.count):
            raise pickle.UnpicklingError(f"the storage {reprlib.repr(pid)}")
        if self.storages.setdefault(storage.key, storage) != storage:
            raise pickle.UnpicklingError(f"two kinds of storage {storage.key!r}")
        return storage


def _read_zip(content: bytes) -> tuple[Any, dict[str, bytes]]:
    left = len(content)  # stored members that share bytes could ask for more
    with zipfile.ZipFile(io.BytesIO(content)) as archive:

        def read(name: str) -> bytes:
            nonlocal left
            member = archive.getinfo(name)
            left -= member.file_size
            if member.compress_type != zipfile.ZIP_STORED or left < 0:
                raise pickle.UnpicklingError(f"{name}, compressed or sharing its bytes with others")
            return archive.read(member)

        tables = [name for name in archive.namelist() if name.partition("/")[2] == "data.pkl"]
        if len(tables) != 1:
            raise pickle.UnpicklingError(f"{len(tables)} tables of tensors")
        root = tables[0].removesuffix("data.pkl")
        if f"{root}byteorder" in archive.namelist() and read(f"{root}byteorder") != b"little":
            raise pickle.UnpicklingError("big-endian numbers")
        unpickler = _Unpickler(io.BytesIO(read(tables[0])))
        table = unpickler.load()
        return table, {key: read(f"{root}data/{key}") for key in unpickler.storages}


def _read_row(content: bytes) -> tuple[Any, dict[str, bytes]]:
    stream = io.BytesIO(content)
    magic, protocol, system = (_Unpickler(stream).load() for _ in range(3))
    if (magic, protocol) != (_MAGIC, _PROTOCOL) or not isinstance(system, dict) or not system.get("little_endian"):
        raise pickle.UnpicklingError(f"the head {reprlib.repr((magic, protocol, system))}")
    unpickler = _Unpickler(stream)
    table = unpickler.load()
    contents = {}
    for key in _Unpickler(stream).load():
        storage = unpickler.storages[key]
        (count,) = struct.unpack("<q", stream.read(8))
        if count != storage.count:
            raise pickle.UnpicklingError(f"{count} numbers in storage {key}, announced with {storage.count}")
        contents[key] = stream.read(count * storage.dtype.itemsize)
    return table, contents


def _read_saved(content: bytes, read: Callable[[bytes], tuple[Any, dict[str, bytes]]]) -> dict[str, torch.Tensor]:
    table, contents = read(content)
    if not isinstance(table, dict):
        raise pickle.UnpicklingError(f"a {type(table).__name__}, not a table")
    # Writable, as a tensor's memory must be; tensors share it, so that no file asks for more than its own size.
    memory = {key: bytearray(part) for key, part in contents.items()}
    tensors = {}
    for name, value in table.items():
        if type(name) is not str or not isinstance(value, _Strided):
            raise pickle.UnpicklingError(f"{name!r}, which is not the name of a tensor")
        dtype, key, count = value.storage
        if len(memory[key]) != count * dtype.itemsize:
            raise pickle.UnpicklingError(f"{len(memory[key])} bytes for {count} numbers of {dtype}")
        flat = torch.frombuffer(memory[key], dtype=dtype) if count else torch.empty(0, dtype=dtype)
        tensors[name] = flat.as_strided(value.size, value.stride, value.offset)
    return tensors


def read_tensors(content: bytes, source: str) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, or of one that torch.save wrote of a state dict, on the CPU.

    Args:
        content: the file.
        source: its name, for errors.

    Raises:
        DataError: anything but a flat table of named tensors. Nothing of it has been run.
    """
    try:
        # Eight bytes of length, which may begin like any other format, then JSON.
        if content[8:9] == b"{":
            return safetensors.torch.load(content)
        if content.startswith(b"PK"):
            return _read_saved(content, _read_zip)
        if content.startswith(b"\x80"):
            return _read_saved(content, _read_row)
        return safetensors.torch.load(content)
    except (Exception, MemoryError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{source}: refused, not a file of named tensors ({reason})") from error
