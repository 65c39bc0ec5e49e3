"""Evil archives and evil pickles do nothing but raise a clear error: no canary file may appear."""

import os
import pickle
import struct
import subprocess
import tarfile
import tracemalloc

import cifar_files
import numpy
import pytest

from fastcifar.data import DataError, archive, cifar, folders, unpickling

WANTED = "cifar-100-python/train"


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """A file that any code smuggled into the process would make, relative or absolute."""
    place = tmp_path / "work"
    place.mkdir()
    monkeypatch.chdir(place)
    path = place / "canary"
    yield path
    assert not path.exists()
    assert [p.name for p in place.iterdir()] in ([], ["evil.tar.gz"], ["cifar-100-python.tar.gz"])
    assert not (tmp_path / "canary").exists()


class Call:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Key:
    def __reduce__(self):
        return os.mkdir, ("canary",)


class Built:
    def __setstate__(self, state):
        raise AssertionError("must not run")

    def __reduce__(self):
        return (Built, (), {"a": 1})


class ListItems(list):
    def __reduce__(self):
        return (list, (), None, iter([Call(os.mkdir, "canary")]))


EVIL = {
    "os.system": lambda path: Call(os.system, f"touch {path}"),
    "eval": lambda path: Call(eval, f"open({str(path)!r}, 'w')"),
    "open": lambda path: Call(open, str(path), "w"),
    "mkdir among list items": lambda path: ListItems(),
    "getattr": lambda path: Call(getattr, numpy.ndarray, "dump"),
    "numpy.save": lambda path: Call(numpy.save, str(path), numpy.zeros(1)),
    "built object": lambda path: Built(),
    "huge allocation": lambda path: Call(numpy.ndarray, (10**13,)),
    "among arguments": lambda path: Call(numpy.dtype, Call(os.mkdir, "canary")),
    "below lists, tables and tuples": lambda path: {b"data": [({b"x": [Call(os.mkdir, "canary")]},)]},
    "as a key": lambda path: {Key(): 1},
    "twice by the memo": lambda path: [shared := Call(os.mkdir, "canary"), shared],
    "subprocess": lambda path: Call(subprocess.run, ["touch", "canary"]),
    "import": lambda path: Call(__import__, "antigravity"),
    "pickle in a pickle": lambda path: Call(pickle.loads, pickle.dumps(Call(os.mkdir, "canary"))),
    "a function itself": lambda path: os.system,
    "a set": lambda path: {1, 2, Key()},
    "ctypes": lambda path: numpy.ctypeslib.as_array,
    "object array": lambda path: {b"data": numpy.array([Call(os.mkdir, "canary")], dtype=object)},
    "float array": lambda path: {b"data": numpy.zeros(4)},
}


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("evil", EVIL.values(), ids=EVIL.keys())
def test_evil_pickles(evil, protocol, canary):
    content = pickle.dumps(evil(canary), protocol=protocol)
    with pytest.raises(DataError, match="refused, not a CIFAR batch"):
        unpickling.read_table(content, "train")


def opcodes(*parts):
    return b"\x80\x02" + b"".join(parts) + b"."


HANDMADE = {
    "stack_global": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0ctouch canary\x85R.",
    "inst": b"(S'touch canary'\nios\nsystem\n.",
    "obj": opcodes(b"(cos\nsystem\n", b"X\x0c\x00\x00\x00touch canary", b"o"),
    "dotted name": b"\x80\x04\x8c\x05numpy\x8c\x0dndarray.dumps\x93.",
    "extension registry": opcodes(b"\x82\x01"),
    "persistent id": b"Pcanary\n.",
    "call ndarray": opcodes(b"cnumpy\nndarray\n", b"(J\x00\x00\x00\x40", b"tR"),
    "wrong length": opcodes(b"cnumpy.core.multiarray\n_reconstruct\n", b"(cnumpy\nndarray\nK\x00\x85U\x01btR",
                            b"(K\x01(K\x05tcnumpy\ndtype\n(U\x02u1K\x00K\x01tR\x89U\x02abtb"),
    "called from the memo": opcodes(b"cos\nmkdir\nq\x000h\x00", b"X\x06\x00\x00\x00canary\x85R"),
    "allowed name from the memo, called": opcodes(b"cnumpy\nndarray\nq\x000h\x00", b"K\x05\x85R"),
    "item of the memo that is not there": opcodes(b"j\xff\xff\xff\x7f"),
    "memo of 32 GB": opcodes(b"]r\xff\xff\xff\xff"),
    "memo of 32 GB, as text": b"]p4294967295\n.",
    "binary persistent id": opcodes(b"U\x06canaryQ"),
    "new object": opcodes(b"cos\nmkdir\n", b"X\x06\x00\x00\x00canary\x85\x81"),
    "new object with keywords": b"\x80\x04cos\nmkdir\nX\x06\x00\x00\x00canary\x85}\x92.",
    "build on a class": opcodes(b"cnumpy\ndtype\n", b"}(U\x08__call__K\x01ub"),
    "state for an array": opcodes(b"cnumpy.core.multiarray\n_reconstruct\n", b"(cnumpy\nndarray\nK\x00\x85U\x01btR",
                                  b"}U\x08__dict__K\x01sb"),
    "out-of-band buffer": b"\x80\x05\x97.",
    "name with line breaks": b"\x80\x04\x8c\x03o\ns\x8c\x06system\x93.",
    "huge integer": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"\1.",
    "integer of a million digits": b"L" + b"9" * 10**6 + b"L\n.",
    "huge bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**63 - 1) + b"x.",
    "huge text": b"\x80\x04\x8d" + struct.pack("<Q", 2**63) + b"x.",
    "type whose name doubles forty times": opcodes(b"cnumpy\ndtype\n", b"U\x01x" + b"2\x86" * 40, b"\x85R"),
    "stack taken empty": opcodes(b"0" * 50),
    "mark without end": opcodes(b"(" * 100_000),
    "nesting of a hundred thousand": b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b".",
    "two pickles": pickle.dumps(1) + pickle.dumps({}),
    "not a table": pickle.dumps([1, 2, 3]),
    "text": b"hello",
    "nothing": b"",
    "huge string length": b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x",
    "huge frame": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"x.",
    "deep nesting": b"\x80\x02" + b"]" * 100 + b"a" * 99 + b"0" * 3,
}  # fmt: skip


@pytest.mark.parametrize("content", HANDMADE.values(), ids=HANDMADE.keys())
def test_handmade_pickles(content, canary):
    tracemalloc.start()
    with pytest.raises(DataError, match="refused, not a CIFAR batch"):
        unpickling.read_table(content, "train")
    assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    tracemalloc.stop()


def test_no_attribute_of_an_allowed_function_can_be_set(canary):
    content = opcodes(b"cnumpy.core.multiarray\n_reconstruct\n", b"(N}U\x0c__defaults__Nstb")
    with pytest.raises(DataError, match="a state for a function"):
        unpickling.read_table(content, "train")


@pytest.mark.parametrize("name", ["train_images", "class_names"])
def test_an_npz_with_pickled_objects(name, canary):
    arrays = {f"{split}_{part}": numpy.zeros(1) for split in ("train", "test") for part in ("images", "labels")}
    arrays[name] = numpy.array([Call(os.mkdir, "canary")], dtype=object)
    numpy.savez(canary.parent.parent / "evil.npz", **arrays)
    with pytest.raises(DataError, match="cannot be read .*pickle"):
        folders.read_npz(canary.parent.parent / "evil.npz")


def test_honest_pickles_are_read():
    table = unpickling.read_table(cifar_files.python_files()["train"], "train")
    assert (table["data"] == cifar_files.PIXELS["train"]).all() and table["fine_labels"] == cifar_files.LABELS["train"]


def member(name, kind=tarfile.REGTYPE, link=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


EVIL_MEMBERS = {
    "parent folder": [("../canary", b"x")],
    "absolute name": [("/tmp/../canary", b"x")],
    "symbolic link": [(member(WANTED, tarfile.SYMTYPE, "/etc/passwd"), b"")],
    "hard link": [(member(WANTED, tarfile.LNKTYPE, "/etc/passwd"), b"")],
    "device": [(member(WANTED, tarfile.CHRTYPE), b"")],
    "fifo": [(member(WANTED, tarfile.FIFOTYPE), b"")],
    "folder": [(member(WANTED, tarfile.DIRTYPE), b"")],
    "link to the outside, then a file through it": [
        (member("cifar-100-python", tarfile.SYMTYPE, "/tmp"), b""),
        ("cifar-100-python/canary", b"x"),
    ],
    "other names only": [("train", b"x")],
    "a name with a parent folder in it": [("cifar-100-python/../../canary", b"x")],
    "a name for Windows": [("..\\canary", b"x"), ("C:\\canary", b"x")],
    "the wanted name with a dot": [("./" + WANTED, b"x")],
    "block device": [(member(WANTED, tarfile.BLKTYPE), b"")],
    "link, then the file that it names": [(member(WANTED, tarfile.SYMTYPE, "real"), b""), ("real", b"x")],
    "link to itself": [(member(WANTED, tarfile.SYMTYPE, WANTED), b"")],
    "unknown kind": [(member(WANTED, b"Z"), b"")],
    "setuid file elsewhere": [("usr/bin/canary", b"x")],
}


@pytest.mark.parametrize("members", EVIL_MEMBERS.values(), ids=EVIL_MEMBERS.keys())
def test_evil_members(members, canary):
    path = cifar_files.write_archive(canary.parent / "evil.tar.gz", members)
    with pytest.raises(DataError, match=r"evil\.tar\.gz: (refused|lacks)"):
        archive.read_members(path, [WANTED])


@pytest.mark.parametrize(
    "kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME], ids=["file", "pax", "name"]
)
@pytest.mark.parametrize("name", [WANTED, "other"], ids=["wanted", "other"])
def test_a_header_of_ten_gigabytes(name, kind, canary):
    path = cifar_files.huge_header(canary.parent / "evil.tar.gz", name, 10 * 2**30, kind)
    tracemalloc.start()
    with pytest.raises(DataError, match="refused|damaged"):
        archive.read_members(path, [WANTED])
    assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    tracemalloc.stop()


def test_a_gzip_bomb_is_stopped(canary, monkeypatch):
    monkeypatch.setattr(archive, "TOTAL_LIMIT", 2**20)
    path = cifar_files.write_archive(canary.parent / "evil.tar.gz", [("other", bytes(2**22)), (WANTED, b"x")])
    assert path.stat().st_size < 2**16
    with pytest.raises(DataError, match="unpacks to more than 1 MiB"):
        archive.read_members(path, [WANTED])


@pytest.mark.parametrize("keep", [0, 10, 100, 0.5, 0.99], ids=str)
def test_a_truncated_archive(keep, canary):
    files = cifar_files.python_files()
    path = canary.parent / "evil.tar.gz"
    cifar_files.write_archive(path, [(f"cifar-100-python/{name}", content) for name, content in files.items()])
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(DataError, match=r"evil\.tar\.gz: (damaged|refused|lacks)"):
        archive.read_members(path, [f"cifar-100-python/{name}" for name in files])


def test_a_wrong_hash_keeps_the_archive_closed(canary, monkeypatch):
    path = cifar_files.write_archive(canary.parent / "cifar-100-python.tar.gz", [(WANTED, b"x")])
    monkeypatch.setattr(archive, "read_members", lambda *arguments: pytest.fail("the archive was opened"))
    with pytest.raises(DataError, match="MD5"):
        cifar.read("cifar100", path)
