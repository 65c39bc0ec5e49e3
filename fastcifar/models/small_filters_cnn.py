"""Plain three-layer network of 57,332 parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fastcifar.models.layers import Activation


class SmallFiltersCNN(nn.Module):
    """conv3×3 → activation → 2×2 max-pool, three times, then a linear classifier on the 4×4 map."""

    def __init__(self, num_classes: int, widths: Sequence[int], activation: str):
        super().__init__()
        if len(widths) != 3 or any(not isinstance(w, int) or w < 1 for w in widths):
            raise ValueError(f"small_filters_cnn: widths must be three ints ≥ 1, got {tuple(widths)}")
        layers, channels = [], 3
        for width in widths:
            layers += [nn.Conv2d(channels, width, 3, padding=1), Activation(activation), nn.MaxPool2d(2)]
            channels = width
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(channels * 16, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, 3, 32, 32] → logits [N, num_classes]."""
        return self.fc(self.features(x).flatten(1))


def small_filters_cnn(
    num_classes: int = 100, *, widths: Sequence[int] = (8, 16, 32), activation: str = "relu"
) -> SmallFiltersCNN:
    """57,332 parameters with 100 classes.

    Args:
        num_classes: size of the output.
        widths: channels of the three convolutions.
        activation: see `fastcifar.nn.DepthwiseConvBNAct`.

    Raises:
        ValueError: an option out of range.
    """
    return SmallFiltersCNN(num_classes, widths, activation)
