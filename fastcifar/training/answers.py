"""A teacher's answers to every crop and flip of every training image, in a file that later runs share.

A crop by up to p pixels and a flip make 2·(2p + 1)² views of an image, so there are more views than a run of usual
length sees images: the file pays from the second run with the same teacher on.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pathlib

import numpy
import torch

from fastcifar import data
from fastcifar.data.download import cache_folder
from fastcifar.training.distil import Teacher

# Images whose views go through the teacher at once; always the same ones, so that answers do not depend on history.
_BLOCK = 8


class Answers:
    """Logits of a teacher for the views that a loader draws, float16.

    Whatever of them is missing is computed first, and kept: an interrupted computation goes on where it was.

    Args:
        teacher: whose answers they are.
        loader: of crops and flips only, in one process.
        dataset: whose training images the loader draws.
        device: of the teacher.

    Attributes:
        path: the file in the cache folder, float16 [images, views, classes].
    """

    def __init__(self, teacher: Teacher, loader: data.ResidentLoader, dataset: data.ImageDataset, device: torch.device):
        self._loader = loader
        images = numpy.ascontiguousarray(dataset.train_images)
        options = loader.augmentation
        kind = f"{options.crop_mode}{options.crop_pad}-{loader.views}-{loader.dtype}-{device.type}{teacher.settings}"
        key = hashlib.sha256(f"{teacher.digest}{hashlib.sha256(images).hexdigest()}{kind}".encode()).hexdigest()
        self.path = cache_folder() / "teachers" / f"{key[:24]}.f16"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        shape = (len(images), loader.views, dataset.num_classes)
        size = 2 * math.prod(shape)
        whole = self.path.is_file() and self.path.stat().st_size == size
        if not whole:
            self._progress.unlink(missing_ok=True)
            _reserve(self.path, size)
        self._logits = numpy.memmap(self.path, numpy.float16, "r+", shape=shape)
        done = _read_count(self._progress) if whole else 0
        if done < len(images):
            print(f"computing the teacher's answers to {shape[0]:,} × {shape[1]} views: {self.path}", flush=True)
            self._fill(teacher, done)

    @property
    def _progress(self) -> pathlib.Path:
        return self.path.with_suffix(".json")

    def _fill(self, teacher: Teacher, done: int) -> None:
        count, views, classes = self._logits.shape
        for start in range(done - done % _BLOCK, count, _BLOCK):
            images = torch.arange(start, min(start + _BLOCK, count))
            seen = self._loader.view_images(images.repeat_interleave(views), torch.arange(views).repeat(len(images)))
            logits = teacher.logits(seen).view(len(images), views, classes)
            self._logits[start : start + len(images)] = logits.to(torch.float16).cpu().numpy()
            if (start // _BLOCK) % 500 == 499 or start + _BLOCK >= count:
                self._logits.flush()
                temporary = self._progress.with_suffix(f".{os.getpid()}")
                temporary.write_text(json.dumps(start + len(images)))
                os.replace(temporary, self._progress)

    def of_step(self, step: int) -> torch.Tensor:
        """The answers to the batch of 0-based `step`, [n, classes], on the CPU."""
        images, views = self._loader.views_of(step)
        return torch.from_numpy(self._logits[images.cpu().numpy(), views.cpu().numpy()])


def _reserve(path: pathlib.Path, size: int) -> None:
    """Makes a file of that size. A full disk is an error here; in a mapping of the file it would kill the process."""
    with open(path, "wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)


def _read_count(path: pathlib.Path) -> int:
    try:
        return int(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return 0
