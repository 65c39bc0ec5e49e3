"""Counts the bytes that Triton kernels read and write, in Triton's interpreter: no GPU needed, no clock involved.

A byte that a launch reads twice counts once, as if the launch's cache were perfect; `requested` counts every lane.
What PyTorch's own operators move between the launches is counted too, by the sizes of their tensors, so that a hidden
copy does not go unseen. Code of the compiled module is not seen.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# These give memory but do not touch it, and these write it without reading what was there.
_ALLOCATIONS = ("aten::empty", "aten::new_empty")
_PURE_WRITES = ("aten::copy_", "aten::fill_", "aten::zero_")
ELSEWHERE = "memory of no argument"


@dataclasses.dataclass(frozen=True)
class Row:
    """One Triton launch, or one operator of PyTorch; all figures in bytes.

    `kind` is "triton" or "aten"; `requested_read` and `requested_written` count repeated accesses each time;
    `arguments` tells (read, written) of each tensor that was touched, by its parameter's name.
    """

    name: str
    kind: str
    read: int
    written: int
    requested_read: int
    requested_written: int
    arguments: dict[str, tuple[int, int]]


@dataclasses.dataclass
class Traffic:
    """What `count_traffic` has counted so far, in order."""

    rows: list[Row] = dataclasses.field(default_factory=list)

    @property
    def launches(self) -> list[Row]:
        """The rows of Triton launches."""
        return [row for row in self.rows if row.kind == "triton"]

    @property
    def read(self) -> int:
        """Bytes read by all rows."""
        return sum(row.read for row in self.rows)

    @property
    def written(self) -> int:
        """Bytes written by all rows."""
        return sum(row.written for row in self.rows)

    def passes(self, tensor: torch.Tensor) -> float:
        """Bytes read and written, in units of the bytes of this tensor's elements."""
        return (self.read + self.written) / (tensor.numel() * tensor.element_size())


class _Region:
    """One storage: which of its bytes a launch has read and written."""

    def __init__(self, storage: torch.UntypedStorage):
        self.start, self.size = storage.data_ptr(), storage.nbytes()
        self.touched = {kind: numpy.zeros(self.size, dtype=bool) for kind in ("read", "written")}

    def mark(self, kind: str, addresses: numpy.ndarray, itemsize: int) -> numpy.ndarray:
        """Marks the elements that lie in this storage; returns the addresses that do not."""
        inside = (addresses >= self.start) & (addresses + itemsize <= self.start + self.size)
        offsets = addresses[inside] - self.start
        for byte in range(itemsize):
            self.touched[kind][offsets + byte] = True
        return addresses[~inside]


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte of a tensor's elements and the one after its last."""
    if tensor.numel() == 0:
        return tensor.data_ptr(), tensor.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _tensors(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, (tuple, list)):
        for index, member in enumerate(value):
            yield from _tensors(f"{name}[{index}]", member)
    elif hasattr(value, "base"):
        # A descriptor, or a tensor under another type.
        yield from _tensors(name, value.base)
    elif hasattr(value, "data_ptr"):
        yield name, value


class _Launch:
    """The bookkeeping of one launch."""

    def __init__(self, name: str, arguments: Iterable[tuple[str, Any]]):
        self.name = name
        self.tensors = [found for key, value in arguments for found in _tensors(key, value)]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for _, tensor in self.tensors}
        self.regions = [_Region(storage) for storage in storages.values() if storage.nbytes()]
        self.requested = {"read": 0, "written": 0}
        self.elsewhere: dict[str, list[numpy.ndarray]] = {"read": [], "written": []}

    def access(self, kind: str, pointers: Any, mask: Any) -> None:
        """Notes one load ("read") or store ("written") of the interpreter; `mask` None means all lanes."""
        addresses = numpy.asarray(pointers.data).astype(numpy.int64)
        if mask is not None:
            addresses = addresses[numpy.broadcast_to(numpy.asarray(mask.data, dtype=bool), addresses.shape)]
        addresses = addresses.ravel()
        itemsize = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        self.requested[kind] += addresses.size * itemsize
        for region in self.regions:
            if not addresses.size:
                return
            addresses = region.mark(kind, addresses, itemsize)
        if addresses.size:
            self.elsewhere[kind].append((addresses[:, None] + numpy.arange(itemsize)).ravel())

    def row(self) -> Row:
        """The finished count."""
        other = {kind: numpy.unique(numpy.concatenate(a)).size if a else 0 for kind, a in self.elsewhere.items()}
        total = {kind: other[kind] + sum(int(r.touched[kind].sum()) for r in self.regions) for kind in other}
        arguments = {}
        for name, tensor in self.tensors:
            start, end = _extent(tensor)
            for region in self.regions:
                if region.start <= start < region.start + region.size:
                    window = slice(start - region.start, end - region.start)
                    counts = tuple(int(region.touched[kind][window].sum()) for kind in ("read", "written"))
                    if any(counts):
                        arguments[name] = counts
        if any(other.values()):
            arguments[ELSEWHERE] = (other["read"], other["written"])
        return Row(self.name, "triton", total["read"], total["written"], *self.requested.values(), arguments)


def _bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's distinct elements: an expanded dimension counts once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride else min(size, 1)
    return elements * tensor.element_size()


class _Operators(TorchDispatchMode):
    """Counts PyTorch's operators; looks inside those of other libraries."""

    def __init__(self, rows: list[Row]):
        super().__init__()
        self._rows = rows
        self.paused = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        if func.namespace != "aten":
            device = next((t.device.type for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)), "cpu")
            key = torch._C.DispatchKey.CUDA if device == "cuda" else torch._C.DispatchKey.CPU
            with self:
                return func.redispatch(torch._C.DispatchKeySet(key), *args, **kwargs)
        with self:
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        result = func(*args, **kwargs)
        self._count(func, args, kwargs, inputs, [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)])
        return result

    def _count(self, func, args, kwargs, inputs, outputs):
        name = func._schema.name
        storages = {t.untyped_storage()._cdata for t in inputs}
        fresh = [t for t in outputs if t.untyped_storage()._cdata not in storages]
        changed = [
            tensor
            for index, argument in enumerate(func._schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
            for tensor in tree_leaves(args[index] if index < len(args) else kwargs.get(argument.name))
            if isinstance(tensor, torch.Tensor)
        ]
        if name.startswith(_ALLOCATIONS) or not (fresh or changed):
            return
        unread = {id(t) for t in changed} if name in _PURE_WRITES else set()
        read = sum({id(t): _bytes(t) for t in inputs if id(t) not in unread}.values())
        written = sum(map(_bytes, [*fresh, *changed]))
        if read or written:
            self._rows.append(Row(name, "aten", read, written, read, written, {}))


@contextlib.contextmanager
def _patched(owner: type, replacements: Mapping[str, Callable[[Callable], Callable]]) -> Iterator[None]:
    """Replaces methods by what these functions make of them, for as long as the context lasts."""
    kept = {name: getattr(owner, name) for name in replacements}
    try:
        for name, original in kept.items():
            setattr(owner, name, replacements[name](original))
        yield
    finally:
        for name, original in kept.items():
            setattr(owner, name, original)


class _Observer:
    """What stands between the interpreter and its memory while traffic is counted."""

    def __init__(self):
        self.traffic = Traffic()
        self.operators = _Operators(self.traffic.rows)
        self._launch: _Launch | None = None

    def accessing(self, kinds: Sequence[str], pointer: int, mask: int | None) -> Callable[[Callable], Callable]:
        """Makes a memory operation tell of its accesses; `pointer` and `mask` are positions among its arguments."""

        def wrap(original):
            def access(builder, *args, **kwargs):
                for kind in kinds:
                    self._launch.access(kind, args[pointer], None if mask is None else args[mask])
                return original(builder, *args, **kwargs)

            return access

        return wrap

    def receiving(self, original: Callable) -> Callable:
        """Makes the preparation of a launch tell which tensors it was given."""

        def prepare(executor, args, kwargs):
            on_host, named_on_host = original(executor, args, kwargs)
            arguments = [*zip(executor.arg_names, on_host, strict=False), *named_on_host.items()]
            self._launch = _Launch(executor.fn.__name__, arguments)
            return on_host, named_on_host

        return prepare

    def launching(self, original: Callable) -> Callable:
        """Makes a whole launch a row; what the interpreter itself does with PyTorch does not count."""

        def launch(executor, *args, **kwargs):
            self.operators.paused = True
            try:
                original(executor, *args, **kwargs)
                self.traffic.rows.append(self._launch.row())
            finally:
                self._launch, self.operators.paused = None, False

        return launch


_counting = threading.Lock()


@contextlib.contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Counts what everything inside the context moves.

    Yields:
        A `Traffic` whose `rows` grow with each launch and operator.

    Raises:
        RuntimeError: Triton's interpreter is off, so that launches would go uncounted; or contexts are nested.
    """
    from triton import knobs
    from triton.runtime import interpreter

    if not knobs.runtime.interpret:
        raise RuntimeError("count_traffic needs Triton's interpreter: set TRITON_INTERPRET=1 before importing kernels")
    if not _counting.acquire(blocking=False):
        raise RuntimeError("count_traffic: only one context at a time can count")
    observer = _Observer()
    both = ("read", "written")
    memory = {
        "create_masked_load": observer.accessing(["read"], 0, 1),
        "create_masked_store": observer.accessing(["written"], 0, 2),
        "create_atomic_rmw": observer.accessing(both, 1, 3),
        "create_atomic_cas": observer.accessing(both, 0, None),
    }
    launches = {"__call__": observer.launching, "_init_args_hst": observer.receiving}
    try:
        with (
            _patched(interpreter.InterpreterBuilder, memory),
            _patched(interpreter.GridExecutor, launches),
            observer.operators,
        ):
            yield observer.traffic
    finally:
        _counting.release()


def _graph_tensors(outputs: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Tensors that hang on Python-made nodes of the autograd graph beside what was saved properly."""
    pending, seen = [output.grad_fn for output in outputs], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        pending += [following for following, _ in node.next_functions]
        yield from (t for t in tree_leaves(list(getattr(node, "__dict__", {}).values())) if isinstance(t, torch.Tensor))


def saved_bytes(call: Callable[[], Any], *, parameters: Iterable[torch.Tensor] = ()) -> tuple[Any, int]:
    """The result of a call, and the bytes it keeps in memory for backward.

    Counts each storage once, whole; `parameters`, which stay in memory anyway, do not count.
    """
    kept: dict[int, int] = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = call()
    for tensor in _graph_tensors([t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]):
        keep(tensor)
    for parameter in parameters:
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    return result, sum(kept.values())
