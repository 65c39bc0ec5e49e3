"""Files of named tensors: what torch.save and safetensors write is read, and nothing else is, or run."""

import collections
import io
import os
import pickle
import zipfile

import pytest
import safetensors.torch
import torch

from fastcifar.data import DataError
from fastcifar.data.tensors import read_tensors


def honest():
    torch.manual_seed(0)
    shared = torch.randn(6, 4)
    table = collections.OrderedDict(
        plain=torch.randn(2, 3, 5),
        scalar=torch.tensor(7),
        half=torch.randn(3).half(),
        bfloat16=torch.randn(3).bfloat16(),
        double=torch.randn(3, dtype=torch.float64),
        empty=torch.empty(0, 4),
        transposed=torch.randn(3, 4).T,
        rows=shared[2:4],
        column=shared[:, 1],
        expanded=torch.randn(1, 3).expand(4, 3),
        parameter=torch.nn.Parameter(torch.randn(2)),
    )
    table._metadata = {"": {"version": 1}}
    return table


def saved(table, zipped=True):
    stream = io.BytesIO()
    torch.save(table, stream, _use_new_zipfile_serialization=zipped)
    return stream.getvalue()


def safe(table):
    return safetensors.torch.save({name: tensor.detach().contiguous().clone() for name, tensor in table.items()})


WRITERS = {"zip": saved, "before torch 1.6": lambda table: saved(table, zipped=False), "safetensors": safe}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS.keys())
def test_honest_files_are_read(write):
    table = honest()
    found = read_tensors(write(table), "file")
    assert found.keys() == table.keys()
    for name, tensor in table.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


class Call:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Reference:
    """Pickled as the persistent id."""

    def __init__(self, identity):
        self.identity = identity


class _Pickler(pickle.Pickler):
    def persistent_id(self, value):
        return value.identity if isinstance(value, Reference) else None


def pickled(value):
    stream = io.BytesIO()
    _Pickler(stream, protocol=2).dump(value)
    return stream.getvalue()


def storage(kind=torch.FloatStorage, key="0", count=4, *view):
    return Reference(("storage", kind, key, "cpu", count, *view))


def rebuilt(*arguments):
    return Call(torch._utils._rebuild_tensor_v2, *arguments, False, collections.OrderedDict())


def archived(value, members=(("archive/data/0", bytes(16)),), kind=zipfile.ZIP_STORED):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", kind) as archive:
        for name, content in (("archive/data.pkl", pickled(value)), *members):
            archive.writestr(name, content)
    return stream.getvalue()


def row(value, magic=0x1950A86A20F9469CFC6C, keys=("0",), tail=b"\4" + bytes(7 + 16)):
    head = [magic, 1001, {"little_endian": True}, value, list(keys)]
    return b"".join(pickled(part) for part in head) + tail


def tensor(*shape, kind=torch.FloatStorage, offset=0, stride=(1,), **options):
    return {"x": rebuilt(storage(kind, **options), offset, shape or (4,), stride)}


CALLS = {
    "posix.system": Call(os.system, "touch canary"),
    "builtins?.eval": Call(eval, "open('canary', 'w')"),
    "posix.mkdir": [Call(os.mkdir, "canary")],
    "torch.serialization.load": Call(torch.load, "canary"),
    "torch._utils._rebuild_tensor": {"x": Call(torch._utils._rebuild_tensor, storage(), 0, (4,), (1,))},
    "torch.IntStorage": tensor(kind=torch.IntStorage),
    "builtins?.getattr": {"x": Call(getattr, collections.OrderedDict(), "update")},
}


@pytest.mark.parametrize("write", [archived, row, pickled], ids=["zip", "before torch 1.6", "pickle"])
@pytest.mark.parametrize(("name", "value"), CALLS.items(), ids=CALLS.keys())
def test_other_names_are_refused_by_name(write, name, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pattern = name.replace("builtins?", "(builtins|__builtin__)")
    with pytest.raises(DataError, match=rf"file: refused, not a file of named tensors \(the name {pattern}\)"):
        read_tensors(write(value), "file")
    assert not list(tmp_path.iterdir())


def test_what_the_refused_files_are_made_of_is_accepted():
    for content in (archived(tensor()), row(tensor())):
        assert torch.equal(read_tensors(content, "file")["x"], torch.zeros(4))


REFUSED = {
    "beyond its storage": (archived(tensor(5)), "out of bounds"),
    "behind its storage": (archived(tensor(offset=1)), "out of bounds"),
    "negative offset": (archived(tensor(offset=-1)), "'offset': -1"),
    "endless size": (archived(tensor(2**70, stride=(0,))), "size"),
    "true as a size": (archived(tensor(True)), "size"),
    "no strides": (archived(tensor(stride=())), "stride"),
    "not a storage": (archived({"x": rebuilt(1, 0, (4,), (1,))}), "a tensor without a plain storage"),
    "storage of no kind": (archived({"x": rebuilt(storage(1), 0, (4,), (1,))}), "the storage"),
    "a view of a storage": (row({"x": rebuilt(storage(torch.FloatStorage, "0", 4, 1), 0, (4,), (1,))}), "the pers"),
    "another id": (archived(Reference(("module", 1))), r"the persistent id \('module', 1\)"),
    "one storage of two kinds": (archived({**tensor(), "y": tensor(kind=torch.LongStorage)["x"]}), "two kinds"),
    "short storage": (archived(tensor(), [("archive/data/0", bytes(15))]), "15 bytes for 4 numbers of torch.float32"),
    "no storage": (archived(tensor(), []), "no item named 'archive/data/0'"),
    "compressed": (archived(tensor(), kind=zipfile.ZIP_DEFLATED), "compressed"),
    "two tables": (archived(tensor(), [("archive/data/0", bytes(16)), ("b/data.pkl", b"")]), "2 tables"),
    "big-endian": (archived(tensor(), [("archive/data/0", bytes(16)), ("archive/byteorder", b"big")]), "big-endian"),
    "a list": (archived([1]), "a list, not a table"),
    "a table in a table": (archived({"state": {}}), "'state', which is not the name of a tensor"),
    "a number as a name": (archived({1: tensor()["x"]}), "1, which is not the name of a tensor"),
    "another magic number": (row(tensor(), magic=1), r"the head \(1, 1001"),
    "storage of another length": (row(tensor(), tail=bytes(24)), "0 numbers in storage 0, announced with 4"),
    "storage cut short": (row(tensor(), tail=b"\4" + bytes(7)), "0 bytes for 4 numbers"),
    "a storage nobody asked for": (row(tensor(), keys=("0", "1")), "'1'"),
    "no zip": (b"PK\x03\x04", "not a zip file"),
    "text": (b"hello", "header too small"),
    "nothing": (b"", "header too small"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_damaged_and_dishonest_files_are_refused(content, words):
    with pytest.raises(DataError, match=rf"^weights\.pth: refused, not a file of named tensors \(.*{words}"):
        read_tensors(content, "weights.pth")


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS.keys())
def test_a_file_cut_anywhere_is_refused(write):
    content = write({"x": torch.randn(3), "y": torch.randn(2, 2)})
    for length in range(0, len(content), 7):
        with pytest.raises(DataError, match="refused"):
            read_tensors(content[:length], "file")


def test_members_that_share_their_bytes_do_not_fill_the_memory():
    big = bytes(2**20)
    table = {str(n): rebuilt(storage(key=str(n), count=2**18), 0, (4,), (1,)) for n in range(9)}
    empty = [(f"archive/data/{n}", b"") for n in range(1, 9)]
    content = bytearray(archived(table, [("archive/data/0", big), *empty]))
    with zipfile.ZipFile(io.BytesIO(bytes(content))) as archive:
        first = archive.getinfo("archive/data/0")
    # In the central directory all storages become the first one.
    for n in range(1, 9):
        place = content.rindex(f"archive/data/{n}".encode()) - 46
        content[place + 16 : place + 20] = first.CRC.to_bytes(4, "little")
        content[place + 20 : place + 28] = len(big).to_bytes(4, "little") * 2
        content[place + 42 : place + 46] = first.header_offset.to_bytes(4, "little")
    with pytest.raises(DataError, match="sharing its bytes"):
        read_tensors(bytes(content), "file")


@pytest.mark.parametrize("length", [0x80, 0x4B50], ids=["as a pickle begins", "as an archive begins"])
def test_the_length_at_the_start_may_look_like_another_format(length):
    content = safetensors.torch.save({"name": torch.arange(3)})
    end = 8 + int.from_bytes(content[:8], "little")
    content = length.to_bytes(8, "little") + content[8:end].ljust(length) + content[end:]
    assert content.startswith((b"\x80", b"PK"))
    assert torch.equal(read_tensors(content, "file")["name"], torch.arange(3))
