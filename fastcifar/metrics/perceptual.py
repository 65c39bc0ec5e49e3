"""LPIPS, and the nearest training image of each generated one by it."""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy
import torch
from torch import nn

from fastcifar.data.dataset import DataError
from fastcifar.data.download import cache_folder
from fastcifar.data.tensors import read_tensors

FILE = "lpips/squeeze-v0.1.safetensors"
# The features are compared after these of SqueezeNet's layers, and have so many channels there.
_COMPARED, _CHANNELS = (1, 4, 7, 9, 10, 11, 12), (64, 128, 256, 384, 384, 512, 512)
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_SMALLEST = 17
# Images whose vectors are held at once: 100 kB each at 32 × 32.
_GENERATED, _REAL, _EXACT = 2000, 500, 50
# Candidates beyond those wanted, whose distances are computed without cancellation.
_SPARE = 4


class _Fire(nn.Module):
    def __init__(self, channels: int, squeezed: int, expanded: int):
        super().__init__()
        self.squeeze = nn.Conv2d(channels, squeezed, 1)
        self.expand1x1 = nn.Conv2d(squeezed, expanded, 1)
        self.expand3x3 = nn.Conv2d(squeezed, expanded, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.squeeze(x).relu_()
        return torch.cat([self.expand1x1(x), self.expand3x3(x)], 1).relu_()


def _squeezenet() -> nn.Sequential:
    """The features of SqueezeNet 1.1, with torchvision's names."""
    pool = nn.MaxPool2d(3, 2, ceil_mode=True)
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, 2), nn.ReLU(inplace=True), pool,
        _Fire(64, 16, 64), _Fire(128, 16, 64), pool,
        _Fire(128, 32, 128), _Fire(256, 32, 128), pool,
        _Fire(256, 48, 192), _Fire(384, 48, 192), _Fire(384, 64, 256), _Fire(512, 64, 256),
    )  # fmt: skip


def _build(tensors: Mapping[str, torch.Tensor], path: pathlib.Path) -> tuple[nn.Sequential, list[torch.Tensor]]:
    """SqueezeNet's features and the roots [1, C, 1, 1] of LPIPS's weights."""
    features = _squeezenet()
    wanted = {f"features.{name}": tensor.shape for name, tensor in features.state_dict().items()}
    wanted |= {f"lin{n}.model.1.weight": (1, channels, 1, 1) for n, channels in enumerate(_CHANNELS)}
    for name in sorted(wanted.keys() | tensors.keys()):
        found = list(tensors[name].shape) if name in tensors else "missing"
        expected = list(wanted[name]) if name in wanted else "absent"
        if found != expected:
            raise DataError(f"{path} does not hold LPIPS with SqueezeNet: {name} is {found}, must be {expected}")
    features.load_state_dict({name.removeprefix("features."): tensors[name] for name in tensors if name[0] == "f"})
    weights = [tensors[f"lin{n}.model.1.weight"].float() for n in range(len(_CHANNELS))]
    if any((weight < 0).any() for weight in weights):
        raise DataError(f"{path} does not hold LPIPS: some of its weights of channels are negative")
    return features.requires_grad_(False), [weight.sqrt() for weight in weights]


class Lpips:
    """LPIPS 0.1 with the features of SqueezeNet 1.1: the perceptual distance of two images, 0 for equal ones.

    Args:
        weights: a safetensors file with `features.*` (SqueezeNet's) and `lin0.model.1.weight` … `lin6.model.1.weight`
            (LPIPS's). Default: `lpips/squeeze-v0.1.safetensors` in the cache folder ($FASTCIFAR_CACHE, else
            ~/.cache/fastcifar).
        device: of the network.

    Attributes:
        digest: SHA-256 of the weights' file.

    Raises:
        DataError: no weights, or others than these.

    Source: Zhang et al., The unreasonable effectiveness of deep features as a perceptual metric, 2018.
    """

    name = "lpips 0.1 squeezenet 1.1"

    def __init__(self, weights: str | None = None, device: torch.device | str = "cpu"):
        path = pathlib.Path(weights) if weights is not None else cache_folder() / FILE
        if not path.is_file():
            raise DataError(
                f"LPIPS needs its weights, and there is no file {path}; put them there or give their path "
                "(docs/gans.md of the sources says how to make the file)"
            )
        content = path.read_bytes()
        self.device, self.digest = torch.device(device), hashlib.sha256(content).hexdigest()
        self._features, self._roots = _build(read_tensors(content, str(path)), path)
        self._features.to(self.device)
        self._roots = [root.to(self.device) for root in self._roots]
        self._shift, self._scale = (torch.tensor(v, device=self.device).view(3, 1, 1) for v in (_SHIFT, _SCALE))

    @torch.no_grad()
    def vectors(self, images: torch.Tensor) -> torch.Tensor:
        """f(x), float32 [N, D], so that LPIPS(x, y) = |f(x) − f(y)|²; D = 24,768 for images of 32 × 32.

        Args:
            images: [N, 3, H, W] in [−1, 1].

        Raises:
            ValueError: another shape, or smaller than 17 × 17.
        """
        if images.dim() != 4 or images.shape[1] != 3 or min(images.shape[2:]) < _SMALLEST:
            raise ValueError(f"LPIPS compares images [N, 3, H, W] of at least 17 × 17, got {list(images.shape)}")
        x = (images.to(self.device, torch.float32) - self._shift) / self._scale
        parts = []
        for index, layer in enumerate(self._features):
            x = layer(x)
            if index in _COMPARED:
                root = self._roots[len(parts)] / (x.shape[2] * x.shape[3]) ** 0.5
                parts.append((x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10) * root).flatten(1))
        return torch.cat(parts, 1)

    def __call__(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Distances [N], float32, of images [N, 3, H, W] in [−1, 1]."""
        return (self.vectors(a) - self.vectors(b)).square().sum(1)


class Neighbours(NamedTuple):
    """distances float32 [M, k], ascending, and indices int64 [M, k] of the k nearest images."""

    distances: torch.Tensor
    indices: torch.Tensor


def nearest_neighbours(lpips: Lpips, generated: numpy.ndarray, real: numpy.ndarray, *, count: int = 1) -> Neighbours:
    """The nearest real images of each generated one by LPIPS, among all of them.

    LPIPS is a squared distance of vectors, so all M·N distances come out of matrix products of blocks. These pick the
    nearest few, whose distances are then computed from the differences. Memory does not grow with M or N.

    Args:
        lpips: the distance.
        generated, real: uint8 [M, H, W, 3] and [N, H, W, 3].
        count: k.

    Raises:
        ValueError: images of other kinds or sizes, none, or fewer real ones than k.
    """
    for name, images in (("generated", generated), ("real", real)):
        if (
            images.dtype != numpy.uint8
            or images.ndim != 4
            or images.shape[1:] != generated.shape[1:]
            or not len(images)
        ):
            raise ValueError(
                f"nearest_neighbours: {name} must be uint8 [N, H, W, 3], at least one and all of one size, got "
                f"{images.dtype} {list(images.shape)} beside {list(generated.shape)}"
            )
    if not 1 <= count <= len(real):
        raise ValueError(f"nearest_neighbours: count must be from 1 to {len(real)} real images, got {count}")
    parts = []
    for begin in range(0, len(generated), _GENERATED):
        vectors = torch.cat([*_blocks(lpips, generated[begin : begin + _GENERATED])])
        candidates = _candidates(lpips, vectors, real, min(count + _SPARE, len(real)))
        parts.append(_exact(lpips, vectors, real, candidates, count))
    return Neighbours(torch.cat([p.distances for p in parts]), torch.cat([p.indices for p in parts]))


def neighbour_rows(generated: numpy.ndarray, real: numpy.ndarray, indices: torch.Tensor) -> numpy.ndarray:
    """Each generated image and its k nearest real ones, uint8 [M·(k + 1), H, W, 3]: a grid of k + 1 columns.

    Args:
        generated, real: uint8 [M, H, W, 3] and [N, H, W, 3].
        indices: [M, k], of `nearest_neighbours`.
    """
    rows = numpy.concatenate([generated[:, None], real[indices.cpu().numpy()]], axis=1)  # [M, k + 1, H, W, 3]
    return rows.reshape(-1, *generated.shape[1:])


def _blocks(lpips: Lpips, images: numpy.ndarray, size: int = _REAL) -> Iterator[torch.Tensor]:
    for begin in range(0, len(images), size):
        pixels = torch.from_numpy(numpy.ascontiguousarray(images[begin : begin + size])).to(lpips.device)
        yield lpips.vectors(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1)


def _candidates(lpips: Lpips, vectors: torch.Tensor, real: numpy.ndarray, count: int) -> torch.Tensor:
    """Indices [M, count] of the real images that are nearest by |b|² − 2⟨a, b⟩, but for its rounding."""
    values = vectors.new_empty(len(vectors), 0)
    indices = torch.empty(len(vectors), 0, dtype=torch.int64, device=vectors.device)
    begin = 0
    for block in _blocks(lpips, real):
        scores = torch.addmm(block.square().sum(1), vectors, block.T, alpha=-2)  # [M, block]
        places = torch.arange(begin, begin + len(block), device=vectors.device).expand(len(vectors), -1)
        values, indices = torch.cat([values, scores], 1), torch.cat([indices, places], 1)
        values, best = values.topk(min(count, values.shape[1]), largest=False)
        indices = indices.gather(1, best)
        begin += len(block)
    return indices


def _exact(
    lpips: Lpips, vectors: torch.Tensor, real: numpy.ndarray, candidates: torch.Tensor, count: int
) -> Neighbours:
    width = candidates.shape[1]
    images = candidates.flatten().cpu().numpy()
    parts = []
    for begin in range(0, len(vectors), _EXACT):
        (found,) = _blocks(lpips, real[images[begin * width : (begin + _EXACT) * width]], _EXACT * width)
        found = found.view(-1, width, vectors.shape[1])
        parts.append((found - vectors[begin : begin + _EXACT, None]).square().sum(2))
    distances, best = torch.cat(parts).topk(count, largest=False, sorted=True)
    return Neighbours(distances.cpu(), candidates.gather(1, best).cpu())
