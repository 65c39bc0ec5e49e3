"""Checkpoints: a folder with `state.safetensors` and `checkpoint.json`, complete or absent, no pickle.

A checkpoint is written under a temporary name, its files and folder are flushed to the disk, then it is renamed. Its
JSON holds the hash of the tensors' file and its own, so that damage is found; then the next older one serves.

Formats: 1 had no hash of the JSON itself; 2 is the present one. Older ones are read through `_MIGRATIONS`.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import safetensors
import safetensors.torch
import torch

from fastcifar.training import durable

FORMAT = 2
# What a killed replacement has moved aside serves like any other until the new one stands in its place.
_NAME = re.compile(r"(\.old-)?step-(\d{8})")
_FIELDS = {"format", "step", "sha256", "state"}


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says which, why and what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by name (on the CPU) and everything that is not a tensor."""

    step: int
    tensors: dict[str, torch.Tensor]
    state: dict[str, Any]
    path: pathlib.Path

    @property
    def config(self) -> dict[str, Any]:
        """The options of the run that it belongs to.

        Raises:
            CheckpointError: it holds none.
        """
        config = self.state.get("config")
        if not isinstance(config, dict):
            raise CheckpointError(f"{self.path}/checkpoint.json holds no configuration; the file is damaged")
        return config


def state_sha256(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of the tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save(folder: pathlib.Path, step: int, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> pathlib.Path:
    """Writes the checkpoint of `step` into `folder`, made when missing; one of the same step is replaced.

    Args:
        folder: holds all checkpoints of a run.
        step: updates done so far.
        tensors: any names, any dtype and device.
        state: JSON values.

    Returns:
        The checkpoint's own folder.

    Raises:
        OSError: the disk is full or read-only; what was there before is untouched.
    """
    durable.make_folder(folder)
    target = folder / f"step-{step:08d}"
    work, replaced = folder / f".tmp-{target.name}-{os.getpid()}", folder / f".old-{target.name}"
    shutil.rmtree(work, ignore_errors=True)
    content = safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    note = {"format": FORMAT, "step": step, "sha256": hashlib.sha256(content).hexdigest(), "state": state}
    note = json.loads(json.dumps(note))
    note["own_sha256"] = _own_sha256(note)
    try:
        os.mkdir(work)
        durable.write(work / "state.safetensors", content)
        durable.write(work / "checkpoint.json", json.dumps(note, indent=1).encode())
        durable.flush(work)
        if target.exists():
            _discard(replaced)
            os.rename(target, replaced)
        os.rename(work, target)
        durable.flush(folder)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    _discard(replaced)
    return target


def _discard(path: pathlib.Path) -> None:
    """Deletes a checkpoint where it can; never leaves half of one under a name that counts."""
    doomed = path.with_name(f".tmp-gone-{path.name.removeprefix('.old-')}")
    shutil.rmtree(doomed, ignore_errors=True)
    try:
        os.rename(path, doomed)
    except OSError:
        return
    shutil.rmtree(doomed, ignore_errors=True)


def _own_sha256(note: dict[str, Any]) -> str:
    """SHA-256 over the JSON's content without its own hash, whatever the layout of the file."""
    rest = {key: value for key, value in note.items() if key != "own_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def prune(folder: pathlib.Path, step: int, keep: int) -> None:
    """Deletes what is not needed once the checkpoint of `step` is written.

    The `keep` newest up to that step stay. So do later ones, which a run that went back to `step` will replace: they
    must not crowd out those that it can go on from.
    """
    for path in [path for path in list_checkpoints(folder) if _step(path) <= step][keep:]:
        _discard(path)
    for path in folder.glob(".tmp-*"):
        shutil.rmtree(path, ignore_errors=True)


def _step(path: pathlib.Path) -> int:
    return int(path.name[-8:])


def list_checkpoints(folder: pathlib.Path) -> list[pathlib.Path]:
    """Finished checkpoints, newest first."""
    if not folder.is_dir():
        return []
    found = {path.name: path for path in folder.iterdir() if _NAME.fullmatch(path.name)}
    kept = [path for name, path in found.items() if name.removeprefix(".old-") == name or name[5:] not in found]
    return sorted(kept, key=_step, reverse=True)


def load(path: pathlib.Path) -> Checkpoint:
    """Reads one checkpoint and verifies it.

    Raises:
        CheckpointError: missing, damaged, or of a newer format.
    """
    note = _read_note(path)
    try:
        content = (path / "state.safetensors").read_bytes()
        if hashlib.sha256(content).hexdigest() != note["sha256"]:
            raise CheckpointError(f"{path}/state.safetensors is damaged (its SHA-256 differs from checkpoint.json)")
        tensors = safetensors.torch.load(content)
    except OSError as error:
        raise CheckpointError(f"{path} is not a complete checkpoint ({error})") from error
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}/state.safetensors cannot be read ({error})") from error
    return Checkpoint(step=note["step"], tensors=tensors, state=note["state"], path=path)


def _read_note(path: pathlib.Path) -> dict[str, Any]:
    """checkpoint.json, verified and brought to the present format."""
    try:
        note = json.loads((path / "checkpoint.json").read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a complete checkpoint ({error})") from error
    if not isinstance(note, dict) or not set(note) >= _FIELDS or not isinstance(note["state"], dict):
        raise CheckpointError(f"{path}/checkpoint.json lacks its fields; the file is damaged")
    if type(note["format"]) is not int or not (note["format"] == FORMAT or note["format"] in _MIGRATIONS):
        raise CheckpointError(
            f"{path} has checkpoint format {note['format']!r}, this version reads {min(_MIGRATIONS)} to {FORMAT}; "
            "update fastcifar"
        )
    while note["format"] != FORMAT:
        note = _MIGRATIONS[note["format"]](note)
    if note.get("own_sha256") != _own_sha256(note):
        raise CheckpointError(f"{path}/checkpoint.json is damaged (its content differs from its own SHA-256)")
    if type(note["step"]) is not int or note["step"] < 0:
        raise CheckpointError(f"{path}/checkpoint.json has the step {note['step']!r}; the file is damaged")
    return note


def _from_1(note: dict[str, Any]) -> dict[str, Any]:
    note = {**note, "format": 2}
    return {**note, "own_sha256": _own_sha256(note)}


_MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _from_1}


def find(path: str | pathlib.Path, notify: Callable[[str], None]) -> Checkpoint:
    """The checkpoint that a user means by a path: itself, or the newest sound one of a run folder.

    Args:
        path: a checkpoint, its `checkpoints` folder or the run folder.
        notify: told of each damaged checkpoint that is passed over.

    Raises:
        CheckpointError: nothing usable there.
    """
    path = pathlib.Path(path)
    if (path / "checkpoint.json").is_file():
        return load(path)
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found = list_checkpoints(folder)
    for candidate in found:
        try:
            return load(candidate)
        except CheckpointError as error:
            notify(f"{error}; trying the next older one")
    if not path.exists():
        raise CheckpointError(f"there is no {path}; give a checkpoint or a run folder that holds checkpoints/")
    what = f"none of the {len(found)} checkpoints in {folder} is sound" if found else f"{path} holds no checkpoint"
    raise CheckpointError(f"{what}; give another checkpoint or start the run anew")


def run_folder(path: pathlib.Path) -> pathlib.Path:
    """The folder of the run that the checkpoint at `path` belongs to."""
    return path.parent.parent if path.parent.name == "checkpoints" else path.parent
