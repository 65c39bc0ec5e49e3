"""Checkpoints: a folder with `state.safetensors` and `checkpoint.json`, complete or absent, no pickle.

A checkpoint is written under a temporary name, its files and folder are flushed to the disk, then it is renamed. Its
JSON holds the hash of the tensors' file, so that damage is found; then the next older one serves.
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

FORMAT = 1
_NAME = re.compile(r"step-(\d{8})")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says which, why and what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by name (on the CPU) and everything that is not a tensor."""

    step: int
    tensors: dict[str, torch.Tensor]
    state: dict[str, Any]
    path: pathlib.Path


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
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"step-{step:08d}"
    work = folder / f".tmp-{target.name}-{os.getpid()}"
    shutil.rmtree(work, ignore_errors=True)
    content = safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    note = {"format": FORMAT, "step": step, "sha256": hashlib.sha256(content).hexdigest(), "state": state}
    try:
        work.mkdir()
        _write(work / "state.safetensors", content)
        _write(work / "checkpoint.json", json.dumps(note, indent=1).encode())
        _flush_folder(work)
        if target.exists():
            replaced = folder / f".old-{target.name}-{os.getpid()}"
            os.rename(target, replaced)
            os.rename(work, target)
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            os.rename(work, target)
        _flush_folder(folder)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return target


def _write(path: pathlib.Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def prune(folder: pathlib.Path, keep: int) -> None:
    """Deletes all but the `keep` newest checkpoints and what interrupted runs left unfinished."""
    for path in list_checkpoints(folder)[keep:]:
        shutil.rmtree(path, ignore_errors=True)
    for path in [*folder.glob(".tmp-step-*"), *folder.glob(".old-step-*")]:
        shutil.rmtree(path, ignore_errors=True)


def list_checkpoints(folder: pathlib.Path) -> list[pathlib.Path]:
    """Finished checkpoints, newest first."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if _NAME.fullmatch(p.name)), key=lambda p: p.name, reverse=True)


def load(path: pathlib.Path) -> Checkpoint:
    """Reads one checkpoint and verifies it.

    Raises:
        CheckpointError: missing, damaged, or of a newer format.
    """
    try:
        note = json.loads((path / "checkpoint.json").read_bytes())
        content = (path / "state.safetensors").read_bytes()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a complete checkpoint ({error})") from error
    if not isinstance(note, dict) or not {"format", "step", "sha256", "state"} <= set(note):
        raise CheckpointError(f"{path}/checkpoint.json lacks its fields; the file is damaged")
    if note["format"] != FORMAT:
        raise CheckpointError(
            f"{path} has checkpoint format {note['format']!r}, this version reads {FORMAT}; update fastcifar"
        )
    if hashlib.sha256(content).hexdigest() != note["sha256"]:
        raise CheckpointError(f"{path}/state.safetensors is damaged (its SHA-256 differs from checkpoint.json)")
    try:
        tensors = safetensors.torch.load(content)
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path}/state.safetensors cannot be read ({error})") from error
    return Checkpoint(step=note["step"], tensors=tensors, state=note["state"], path=path)


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
