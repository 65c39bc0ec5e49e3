"""Xception of timm with a head for CIFAR: 21,961,868 parameters, batch-norm statistics counted."""

from __future__ import annotations

import importlib
import pathlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastcifar.data.download import cache_folder, download

NAME = "legacy_xception"
FILE = "xception-43020ad28.pth"
URL = f"https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-cadene/{FILE}"
# The file's name holds the first digits of its hash, as torch hub's names do.
SHA256 = "43020ad28"
_SIZE_LIMIT = 120 * 10**6
# What the published ImageNet weights were trained with.
_MEAN, _STD = 0.5, 0.5


def _timm() -> Any:
    try:
        return importlib.import_module("timm")
    except Exception as error:  # a torchvision that does not fit torch raises RuntimeError
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"--model xception needs timm, which cannot be imported ({reason}); run `pip install 'fastcifar[xception]'`"
        ) from error


class Xception(nn.Module):
    """timm's `legacy_xception` without its classifier, then Linear → ReLU → dropout → Linear.

    Images are brought to `size` × `size` here and not by the loader: so training, evaluation, test-time copies and
    exported programs share one resize, and batches cross the memory at their own size.
    """

    def __init__(self, num_classes: int, size: int, hidden: int, dropout: float):
        super().__init__()
        for name, value, least in (("size", size, 33), ("hidden", hidden, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"xception: {name} must be an int ≥ {least}, got {value!r}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"xception: dropout must lie in [0, 1), got {dropout!r}")
        self.size = size
        self.backbone = _timm().create_model(NAME, num_classes=0)
        self.head = nn.Sequential(
            nn.Linear(self.backbone.num_features, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, num_classes),
        )
        self.register_buffer("scale", torch.ones(3, 1, 1), persistent=False)
        self.register_buffer("shift", torch.zeros(3, 1, 1), persistent=False)

    def normalised_by(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Says how the images that come are normalised, so that the backbone gets them as it was trained on them."""
        for buffer, values in (
            (self.scale, [s / _STD for s in std]),
            (self.shift, [(m - _MEAN) / _STD for m in mean]),
        ):
            buffer.copy_(torch.tensor(values).view(3, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, 3, H, W] → logits [N, num_classes]."""
        x = torch.addcmul(self.shift.to(x.dtype), x, self.scale.to(x.dtype))
        x = F.interpolate(x, (self.size, self.size), mode="bilinear", align_corners=False)
        return self.head(self.backbone(x))


def published_weights() -> pathlib.Path:
    """The file of timm's ImageNet weights, in the cache folder, downloaded there when missing.

    Raises:
        DataError: it is not there and cannot be downloaded; the message names address and place.
    """
    return download(URL, cache_folder() / FILE, sha256=SHA256, size_limit=_SIZE_LIMIT)


def xception(num_classes: int = 100, *, size: int = 71, hidden: int = 512, dropout: float = 0.5) -> Xception:
    """21,961,868 parameters with 100 classes, running mean and variance included; needs timm.

    Args:
        num_classes: size of the output.
        size: height and width that the images are brought to, bilinearly.
        hidden: units of the head's first layer.
        dropout: probability before the classifier.

    Raises:
        ValueError: timm is missing, or an option out of range.

    Source: Chollet, Xception: deep learning with depthwise separable convolutions, 2017.
    """
    return Xception(num_classes, size, hidden, dropout)
