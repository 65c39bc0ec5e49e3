"""The embedded stand-in for CIFAR-100: a hundred classes of shapes with patterns, drawn from a seed.

A class is one of ten shapes filled with one of ten patterns. Colours, place, size, angle, the pattern's phase and the
background are random, and half of the images are negatives, so that no single pixel tells anything: a linear
classifier fails, a small convolutional network learns.
"""

from __future__ import annotations

import numpy

from fastcifar.data.dataset import ImageDataset

SHAPES = ("disc", "square", "triangle", "ring", "cross", "bar", "crescent", "star", "hexagon", "frame")
PATTERNS = ("plain", "stripes", "bars", "checks", "dots", "rings", "gradient", "waves", "grid", "speckle")
_SIDE = 32
NOTICE = (
    "NOTE: this run uses the embedded SYNTHETIC images, not CIFAR: its accuracy says nothing about CIFAR. "
    "Give the real images with --data-dir or FASTCIFAR_DATA."
)


def _inside(shape: int, x: numpy.ndarray, y: numpy.ndarray) -> numpy.ndarray:
    """Whether points of the plane lie in the shape, whose radius is 1."""
    radius, angle = numpy.hypot(x, y), numpy.arctan2(y, x)
    if shape == 0:
        return radius < 0.9
    if shape == 1:
        return numpy.maximum(abs(x), abs(y)) < 0.8
    if shape == 2:
        return (y > -0.6) & (abs(x) * 1.7 + y < 0.9)
    if shape == 3:
        return (radius < 0.95) & (radius > 0.55)
    if shape == 4:
        return (numpy.minimum(abs(x), abs(y)) < 0.28) & (numpy.maximum(abs(x), abs(y)) < 0.95)
    if shape == 5:
        return (abs(x) < 0.3) & (abs(y) < 1.05)
    if shape == 6:
        return (radius < 0.95) & (numpy.hypot(x - 0.45, y) > 0.7)
    if shape == 7:
        return radius < 0.65 + 0.35 * numpy.cos(5 * angle)
    if shape == 8:
        sector = numpy.pi / 3
        return radius * numpy.cos(numpy.mod(angle, sector) - sector / 2) < 0.8
    side = numpy.maximum(abs(x), abs(y))
    return (side < 0.9) & (side > 0.5)


def _pattern(kind: int, x: numpy.ndarray, y: numpy.ndarray, phase: numpy.ndarray, noise: numpy.ndarray):
    """Values in [0, 1] of the pattern at points of the plane."""
    fast = 7.0
    if kind == 0:
        return numpy.ones_like(x)
    if kind == 1:
        return (numpy.sin(fast * y + phase) > 0).astype(x.dtype)
    if kind == 2:
        return (numpy.sin(2 * fast * x + phase) > 0).astype(x.dtype)
    if kind == 3:
        return ((numpy.sin(fast * x + phase) > 0) ^ (numpy.sin(fast * y + phase) > 0)).astype(x.dtype)
    if kind == 4:
        return (numpy.sin(fast * x + phase) * numpy.sin(fast * y + phase) > 0.35).astype(x.dtype)
    if kind == 5:
        return (numpy.sin(1.6 * fast * numpy.hypot(x, y) + phase) > 0).astype(x.dtype)
    if kind == 6:
        return numpy.clip(0.5 + 0.6 * y, 0, 1)
    if kind == 7:
        return 0.5 + 0.5 * numpy.sin(fast * y + 2 * numpy.sin(4 * x) + phase)
    if kind == 8:
        return (numpy.maximum(numpy.sin(fast * x + phase), numpy.sin(fast * y + phase)) > 0.75).astype(x.dtype)
    return (noise > 0).astype(x.dtype)


def _draw(labels: numpy.ndarray, generator: numpy.random.Generator) -> numpy.ndarray:
    """Images [N, 32, 32, 3], uint8, of these classes."""
    count = len(labels)

    def draw(low: float, high: float, *shape: int) -> numpy.ndarray:
        return generator.uniform(low, high, (count, *shape)).astype(numpy.float32)

    axis = (numpy.arange(_SIDE, dtype=numpy.float32) + 0.5) / _SIDE * 2 - 1
    turn, size = draw(-0.4, 0.4, 1, 1), draw(0.55, 0.9, 1, 1)
    across, down = axis[None, None, :] - draw(-0.3, 0.3, 1, 1), axis[None, :, None] - draw(-0.3, 0.3, 1, 1)
    x = (numpy.cos(turn) * across + numpy.sin(turn) * down) / size
    y = (numpy.cos(turn) * down - numpy.sin(turn) * across) / size
    phase = draw(0, 2 * numpy.pi, 1, 1)
    grain = generator.standard_normal((count, _SIDE, _SIDE), numpy.float32)
    inside = numpy.empty((count, _SIDE, _SIDE, 1), bool)
    values = numpy.empty((count, _SIDE, _SIDE, 1), numpy.float32)
    for index in range(10):
        chosen = labels // 10 == index
        inside[chosen, ..., 0] = _inside(index, x[chosen], y[chosen])
        chosen = labels % 10 == index
        values[chosen, ..., 0] = _pattern(index, x[chosen], y[chosen], phase[chosen], grain[chosen])
    light, dark = draw(0.6, 1.0, 1, 1, 3), draw(0.0, 0.35, 1, 1, 3)
    background = draw(0.3, 0.65, 1, 1, 3) + draw(-0.3, 0.3, 1, 1, 3) * (across + down)[..., None]
    image = numpy.where(inside, dark + (light - dark) * values, background)
    negative = generator.integers(0, 2, (count, 1, 1, 1), numpy.uint8) == 1
    image = numpy.where(negative, 1 - image, image)
    image += 0.08 * generator.standard_normal(image.shape, numpy.float32)
    return (numpy.clip(image, 0, 1) * 255 + 0.5).astype(numpy.uint8)


def synthetic(train: int = 10_000, test: int = 2_000, seed: int = 0) -> ImageDataset:
    """The synthetic set: so many images of 32×32, classes in equal numbers (± 1), the same for the same seed."""
    arrays = []
    for split, count in enumerate((train, test)):
        generator = numpy.random.Generator(numpy.random.Philox(key=[seed, split]))
        labels = generator.permutation(numpy.arange(count, dtype=numpy.int64) % 100)
        parts = [_draw(labels[start : start + 1000], generator) for start in range(0, count, 1000)]
        arrays += [numpy.concatenate(parts), labels]
    names = tuple(f"{pattern} {shape}" for shape in SHAPES for pattern in PATTERNS)
    return ImageDataset(
        "synthetic", *arrays, names, synthetic=True, source="the embedded synthetic images", notices=(NOTICE,)
    )
