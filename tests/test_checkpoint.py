"""Checkpoints are complete or absent, verified, and nothing but tensors and JSON."""

import errno
import json
import os

import pytest
import torch

from fastcifar.training import checkpoint

TENSORS = {
    "model.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "model.half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "count": torch.tensor(7),
    "empty": torch.empty(0, 3),
}
STATE = {"seen": 3, "config": {"model": "ds_resnet"}}


def save(folder, step=10, tensors=TENSORS):
    return checkpoint.save(folder, step, tensors, STATE)


def test_round_trip_is_exact(tmp_path):
    loaded = checkpoint.load(save(tmp_path))
    assert loaded.step == 10 and loaded.state == STATE
    assert loaded.tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert loaded.tensors[name].dtype == tensor.dtype
        assert torch.equal(loaded.tensors[name], tensor)


def test_channels_last_and_sliced_tensors_keep_their_values(tmp_path):
    image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    tensors = {"image": image, "part": image[:, 1:, ::2]}
    loaded = checkpoint.load(save(tmp_path, tensors=tensors))
    assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in tensors.items())


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 30, 100):
        save(tmp_path, step)
    (tmp_path / ".tmp-step-00000200-1").mkdir()
    checkpoint.prune(tmp_path, 100, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000030", "step-00000100"]


def test_saving_the_same_step_replaces_it(tmp_path):
    save(tmp_path)
    path = save(tmp_path, tensors={"other": torch.ones(1)})
    assert checkpoint.load(path).tensors.keys() == {"other"}
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000010"]


@pytest.mark.parametrize("position", [0, 100, -1], ids=["first", "middle", "last"])
def test_a_flipped_bit_is_found_and_the_older_one_serves(tmp_path, position):
    old, new = save(tmp_path, 10), save(tmp_path, 20)
    content = bytearray((new / "state.safetensors").read_bytes())
    content[position] ^= 1
    (new / "state.safetensors").write_bytes(content)
    told = []
    assert checkpoint.find(tmp_path, told.append).path == old
    assert len(told) == 1 and "damaged" in told[0] and new.name in told[0]


@pytest.mark.parametrize("name", ["state.safetensors", "checkpoint.json"])
def test_a_truncated_file_is_found(tmp_path, name):
    path = save(tmp_path)
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(checkpoint.CheckpointError):
        checkpoint.load(path)
    with pytest.raises(checkpoint.CheckpointError, match="none of the 1 checkpoints"):
        checkpoint.find(tmp_path, lambda text: None)


def test_a_newer_format_is_refused(tmp_path):
    path = save(tmp_path)
    note = json.loads((path / "checkpoint.json").read_text())
    note["format"] = checkpoint.FORMAT + 1
    (path / "checkpoint.json").write_text(json.dumps(note))
    with pytest.raises(checkpoint.CheckpointError, match="update fastcifar"):
        checkpoint.load(path)


def test_missing_path_and_empty_folder_are_named(tmp_path):
    with pytest.raises(checkpoint.CheckpointError, match="there is no"):
        checkpoint.find(tmp_path / "absent", print)
    with pytest.raises(checkpoint.CheckpointError, match="holds no checkpoint"):
        checkpoint.find(tmp_path, print)


@pytest.mark.parametrize("call", ["mkdir", "open", "fsync", "rename"])
@pytest.mark.parametrize("occurrence", [1, 2, 3])
def test_a_failing_call_leaves_a_sound_checkpoint(tmp_path, monkeypatch, call, occurrence):
    save(tmp_path, 10)
    original, calls, failed = getattr(os, call), 0, False

    def failing(*arguments, **keywords):
        nonlocal calls
        calls += 1
        if calls == occurrence:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*arguments, **keywords)

    monkeypatch.setattr(os, call, failing)
    try:
        save(tmp_path, 20)
    except OSError as error:
        failed = error.errno == errno.ENOSPC
    monkeypatch.undo()
    found = checkpoint.find(tmp_path, lambda text: pytest.fail(text))
    assert found.step == 20 or failed
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in TENSORS.items())
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_hash_depends_on_names_values_dtype_and_shape():
    base = {"a": torch.zeros(4), "b": torch.ones(2)}
    variants = [
        {"a": torch.zeros(4), "c": torch.ones(2)},
        {"a": torch.zeros(4), "b": torch.tensor([1.0, 2.0])},
        {"a": torch.zeros(2, 2), "b": torch.ones(2)},
        {"a": torch.zeros(4, dtype=torch.int32), "b": torch.ones(2)},
    ]
    hashes = {checkpoint.state_sha256(tensors) for tensors in [base, *variants]}
    assert len(hashes) == 5
    assert checkpoint.state_sha256(base) == checkpoint.state_sha256(dict(reversed(base.items())))
