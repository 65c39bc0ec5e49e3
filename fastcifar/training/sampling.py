"""Latents and labels by number, grids of samples, and the metrics of a run in progress."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy
import torch
from torch import nn

from fastcifar import data, models

_GRID_CLASSES, _GRID_SAMPLES, _BATCH = 10, 8, 250
# Apart from the numbers of training steps.
_GRID_NUMBER, _METRIC_NUMBER = 2**40, 2**41


class Draw(NamedTuple):
    """latents [N, Z], labels int64 [N] or None, numbers [N, …] uniform in [0, 1)."""

    latents: torch.Tensor
    labels: torch.Tensor | None
    numbers: torch.Tensor

    def part(self, begin: int, end: int) -> Draw:
        """Rows begin to end."""
        return Draw(*(None if t is None else t[begin:end] for t in self))

    def to(self, device: torch.device) -> Draw:
        """On the device."""
        return Draw(*(None if t is None else t.to(device, non_blocking=True) for t in self))


def draw(gan: models.GAN, seed: int, number: int, count: int, numbers: int = 0) -> Draw:
    """What the `number`-th batch of `count` is made of: the same for the same seed and number, on any device."""
    generator = torch.Generator().manual_seed((seed * 6_364_136_223_846_793_005 + number + 1) % 2**63)
    latents = torch.randn(count, gan.latent_dim, generator=generator)
    labels = torch.randint(gan.num_classes, (count,), generator=generator) if gan.conditional else None
    return Draw(latents, labels, torch.rand(count, numbers, generator=generator))


def to_uint8(images: torch.Tensor) -> numpy.ndarray:
    """Images [N, 3, H, W] in [−1, 1] as uint8 [N, H, W, 3]."""
    scaled = (images.float().clamp(-1, 1) + 1).mul(127.5).round().to(torch.uint8)
    return scaled.permute(0, 2, 3, 1).cpu().numpy()


@torch.no_grad()
def generate(generator: nn.Module, latents: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
    """The generator's images in eval mode, [N, 3, H, W] in [−1, 1]; its mode is put back."""
    was_training = generator.training
    generator.eval()
    parts = []
    for begin in range(0, len(latents), _BATCH):
        part = slice(begin, begin + _BATCH)
        parts.append(generator(latents[part], None if labels is None else labels[part]).float())
    generator.train(was_training)
    return torch.cat(parts)


def sample_batches(
    generator: nn.Module, gan: models.GAN, count: int, device: torch.device, seed: int = 0
) -> Iterator[tuple[numpy.ndarray, torch.Tensor | None]]:
    """`count` images, uint8 [n, H, W, 3], with their labels, in batches; the same for the same seed."""
    for number, begin in enumerate(range(0, count, _BATCH)):
        drawn = draw(gan, seed, _METRIC_NUMBER + number, min(_BATCH, count - begin)).to(device)
        yield to_uint8(generate(generator, drawn.latents, drawn.labels)), drawn.labels


def grid(images: numpy.ndarray, columns: int, scale: int = 2) -> numpy.ndarray:
    """Images uint8 [N, H, W, 3] side by side in rows of `columns`, each pixel `scale` wide: uint8 [H', W', 3]."""
    count, height, width, _ = images.shape
    rows = -(-count // columns)
    sheet = numpy.full((rows * columns, height + 2, width + 2, 3), 255, dtype=numpy.uint8)
    sheet[:count, 1:-1, 1:-1] = images
    sheet = sheet.reshape(rows, columns, height + 2, width + 2, 3).transpose(0, 2, 1, 3, 4)
    sheet = sheet.reshape(rows * (height + 2), columns * (width + 2), 3)
    return sheet.repeat(scale, 0).repeat(scale, 1)


def save_png(path: pathlib.Path, image: numpy.ndarray) -> None:
    """Writes uint8 [H, W, 3].

    Raises:
        ValueError: Pillow is missing.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ValueError(f"{path.name} needs Pillow, which is not installed; run `pip install Pillow`") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def save_gif(path: pathlib.Path, frames: numpy.ndarray, scale: int = 4) -> None:
    """Writes uint8 [F, H, W, 3] as an animation that goes there and back.

    Raises:
        ValueError: Pillow is missing.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ValueError(f"{path.name} needs Pillow, which is not installed; run `pip install Pillow`") from error
    large = [Image.fromarray(frame.repeat(scale, 0).repeat(scale, 1)) for frame in (*frames, *frames[-2:0:-1])]
    large[0].save(path, save_all=True, append_images=large[1:], duration=90, loop=0)


def write_grids(
    folder: pathlib.Path,
    step: int,
    generator: nn.Module,
    gan: models.GAN,
    dataset: data.ImageDataset,
    device: torch.device,
) -> None:
    """reals.png where it is missing, and fakes-NNNNNN.png: a row for each of ten classes (any images without)."""
    count = _GRID_CLASSES * _GRID_SAMPLES
    drawn = draw(gan, 0, _GRID_NUMBER, count)
    classes = numpy.linspace(0, dataset.num_classes - 1, min(_GRID_CLASSES, dataset.num_classes)).round().astype(int)
    labels = None
    if gan.conditional:
        labels = torch.from_numpy(classes).repeat_interleave(_GRID_SAMPLES)[:count].to(device)
    latents = drawn.latents[: count if labels is None else len(labels)].to(device)
    save_png(folder / f"fakes-{step:06d}.png", grid(to_uint8(generate(generator, latents, labels)), _GRID_SAMPLES))
    if not (folder / "reals.png").exists():
        if gan.conditional:
            places = [numpy.flatnonzero(dataset.train_labels == label) for label in classes]
            # A class of few images repeats them, so that the rows stay those of the classes.
            chosen = numpy.concatenate([numpy.resize(place, _GRID_SAMPLES) for place in places if len(place)])
        else:
            chosen = numpy.arange(min(count, len(dataset.train_images)))
        save_png(folder / "reals.png", grid(dataset.train_images[chosen], _GRID_SAMPLES))
