"""Whatever call fails, and wherever a process dies, the last checkpoint can be loaded and the next one written."""

import errno
import itertools
import os
import pathlib
import random
import tempfile

import pytest
import torch
from faults import Faults

from fastcifar.training import checkpoint, durable, run_folder

MODES = {
    "ENOSPC": ("once", errno.ENOSPC),
    "EIO": ("once", errno.EIO),
    "disk gone": ("onwards", errno.EIO),
    "killed": ("killed", 0),
    "power cut": ("power cut", 0),
}


@pytest.fixture
def memory_folder(tmp_path):
    """A folder whose flushing takes no time."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield pathlib.Path(folder)


def tensors(step):
    return {"weight": torch.arange(40.0) + step, "count": torch.tensor(step)}


def save(folder, step):
    checkpoint.save(folder, step, tensors(step), {"seen": step})
    checkpoint.prune(folder, step, keep=2)


def save_first(folder):
    return None, lambda: save(folder / "run" / "checkpoints", 10), folder / "run"


def save_next(folder):
    save(folder, 10)
    return 10, lambda: save(folder, 20), folder


def save_and_delete(folder):
    save(folder, 10)
    save(folder, 20)
    return 20, lambda: save(folder, 30), folder


def save_again(folder):
    save(folder, 10)
    return 10, lambda: save(folder, 10), folder


def save_over_an_interrupted_one(folder):
    save(folder, 10)
    os.rename(folder / "step-00000010", folder / ".old-step-00000010")
    (folder / ".tmp-step-00000010-1").mkdir()
    (folder / ".tmp-step-00000010-1" / "state.safetensors").write_bytes(b"half")
    return 10, lambda: save(folder, 10), folder


SITUATIONS = [save_first, save_next, save_and_delete, save_again, save_over_an_interrupted_one]


def check(folder, before, after):
    """The newest checkpoint is a sound one of before or after, and nothing looks like one that is not."""
    try:
        found = checkpoint.find(folder, notify=lambda text: pytest.fail(text))
    except checkpoint.CheckpointError:
        assert before is None
        return
    assert found.step in (before, after) and found.state == {"seen": found.step}
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in tensors(found.step).items())


@pytest.mark.parametrize(("mode", "number"), MODES.values(), ids=MODES.keys())
@pytest.mark.parametrize("situation", SITUATIONS)
def test_any_call_may_fail(situation, mode, number, memory_folder, monkeypatch, record_property):
    for place in itertools.count():
        folder = memory_folder / str(place)
        folder.mkdir()
        before, act, where = situation(folder)
        after = {save_next: 20, save_and_delete: 30}.get(situation, 10)
        with Faults(monkeypatch, place, mode, number) as faults:
            try:
                act()
            except OSError as error:
                assert error.errno == number
        check(where, before, after)
        if len(faults.done) <= place:
            break
        act()
        check(where, after, after)
        left = [path.name for path in where.rglob("*") if path.name.startswith(".")]
        assert not left, f"after call {place}, {faults.done[place]}"
    assert place >= 9
    record_property("faults", place)


def test_writing_in_small_pieces_is_still_complete(tmp_path, monkeypatch):
    original = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, content: original(descriptor, bytes(content[:7])))
    save(tmp_path, 10)
    check(tmp_path, 10, 10)


@pytest.mark.parametrize("mode", ["once", "onwards", "killed", "power cut"])
def test_a_file_is_replaced_whole_or_not_at_all(mode, tmp_path, monkeypatch, record_property):
    path = tmp_path / "result.json"
    for place in itertools.count():
        run_folder.write_json(path, {"old": 1})
        with Faults(monkeypatch, place, mode, errno.ENOSPC) as faults:
            try:
                run_folder.write_json(path, {"new": 2})
            except OSError as error:
                assert error.errno == errno.ENOSPC
        assert path.read_text() in ('{\n "old": 1\n}\n', '{\n "new": 2\n}\n')
        if len(faults.done) <= place:
            break
    assert place >= 4
    record_property("faults", place)


def test_everything_is_flushed_before_it_is_renamed(tmp_path, monkeypatch):
    save(tmp_path, 10)
    with Faults(monkeypatch) as faults:
        checkpoint.save(tmp_path, 20, tensors(20), {})
    essential = [name for name in faults.done if name in ("mkdir", "write", "fsync", "rename")]
    # Two files, their folder, the name.
    assert essential[:8] == ["mkdir", "write", "fsync", "write", "fsync", "fsync", "rename", "fsync"]


@pytest.mark.parametrize("name", ["state.safetensors", "checkpoint.json"])
def test_any_flipped_bit_is_found(name, tmp_path, record_property):
    save(tmp_path, 10)
    save(tmp_path, 20)
    path = tmp_path / "step-00000020" / name
    sound, draw = path.read_bytes(), random.Random(0)
    for _ in range(150):
        content = bytearray(sound)
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        told = []
        assert checkpoint.find(tmp_path, told.append).step == 10
        assert len(told) == 1 and "step-00000020" in told[0] and "next older" in told[0]
    record_property("flips", 150)


@pytest.mark.parametrize("name", ["state.safetensors", "checkpoint.json"])
def test_any_truncation_is_found(name, tmp_path, record_property):
    save(tmp_path, 10)
    save(tmp_path, 20)
    path = tmp_path / "step-00000020" / name
    sound = path.read_bytes()
    lengths = range(0, len(sound), 7)
    for length in lengths:
        path.write_bytes(sound[:length])
        assert checkpoint.find(tmp_path, lambda text: None).step == 10
    record_property("truncations", len(lengths))


def test_what_an_interrupted_run_left_is_ignored_and_removed(tmp_path):
    save(tmp_path, 10)
    for name in (".tmp-step-00000020", ".tmp-gone-step-00000005", ".tmp-step-00000020-1234"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.safetensors").write_bytes(b"half")
    check(tmp_path, 10, 10)
    save(tmp_path, 20)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000010", "step-00000020"]


def test_a_damaged_newer_checkpoint_does_not_crowd_out_the_good_one(tmp_path):
    save(tmp_path, 10)
    save(tmp_path, 20)
    (tmp_path / "step-00000020" / "state.safetensors").write_bytes(b"damaged")
    checkpoint.save(tmp_path, 12, tensors(12), {})
    checkpoint.prune(tmp_path, 12, keep=1)
    assert checkpoint.find(tmp_path, lambda text: None).step == 12


def test_a_run_folder_belongs_to_one_process(tmp_path):
    folder = run_folder.RunFolder(tmp_path / "run")
    with pytest.raises(ValueError, match="another process is training in .*run"):
        run_folder.RunFolder(tmp_path / "run")
    folder.close()
    run_folder.RunFolder(tmp_path / "run").close()


@pytest.mark.parametrize("mode", ["once", "onwards"])
def test_metrics_outlive_a_full_disk(mode, tmp_path, monkeypatch):
    folder = run_folder.RunFolder(tmp_path)
    folder.add({"step": 1, "train_loss": 0.5})

    def half(row):
        with open(tmp_path / "metrics.jsonl", "a") as file:
            file.write('{"step": 2, "tr')
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(folder, "_append", half)
    folder.add({"step": 2, "train_loss": 0.25})
    assert "No space" in folder.problem
    if mode == "onwards":
        monkeypatch.setattr(durable, "replace", lambda path, content: half(None))
        folder.add({"step": 3, "train_loss": 0.125})
        assert "No space" in folder.problem
    monkeypatch.undo()
    folder.add({"step": 4, "train_loss": 0.1})
    folder.close()
    assert folder.problem is None
    steps = [1, 2, 4] if mode == "once" else [1, 2, 3, 4]
    again = run_folder.RunFolder(tmp_path, step=9)
    again.close()
    assert [row["step"] for row in again.rows] == steps
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == len(steps) + 1
