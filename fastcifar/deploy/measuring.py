"""What a smaller network costs and keeps: bytes, time and accuracy of its ONNX file in ONNX Runtime."""

from __future__ import annotations

import pathlib
import statistics
import time
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fastcifar import data
from fastcifar.deploy import programs

Program = Callable[[torch.Tensor], torch.Tensor]
_BATCH = 100


def pixels(images) -> torch.Tensor:
    """uint8 [N, H, W, 3] as float32 [N, 3, H, W] in [0, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().contiguous() / 255


def accuracy(program: Program, dataset: data.ImageDataset, count: int | None = None) -> float:
    """Of the test images, or the first so many, in percent."""
    labels = torch.from_numpy(dataset.test_labels[:count])
    correct = 0
    for begin in range(0, len(labels), _BATCH):
        part = slice(begin, min(begin + _BATCH, len(labels)))
        correct += (program(pixels(dataset.test_images[part])).argmax(1) == labels[part]).sum().item()
    return 100.0 * correct / len(labels)


def times(runs: Mapping[str, Program], images: torch.Tensor, rounds: int) -> dict[str, float]:
    """Median milliseconds of each program for these images, run in turns."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 2):
        for name, program in runs.items():
            started = time.perf_counter()
            program(images)
            if number >= 2:
                found[name].append(1000 * (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in found.items()}


def compare(
    files: Mapping[str, pathlib.Path], dataset: data.ImageDataset, *, threads: int, rounds: int = 15
) -> list[dict[str, Any]]:
    """A row for each ONNX file: bytes, bytes when compressed by zlib, test accuracy, milliseconds for 100 images."""
    runs = {name: programs.read(path, "onnx", threads) for name, path in files.items()}
    images = pixels(dataset.test_images[:_BATCH])
    spent = times(runs, images, rounds)
    rows = []
    for name, path in files.items():
        content = path.read_bytes()
        rows.append(
            {
                "network": name,
                "bytes": len(content),
                "compressed": len(zlib.compress(content, 9)),
                "accuracy": round(accuracy(runs[name], dataset), 2),
                "ms": round(spent[name], 3),
            }
        )
    return rows
