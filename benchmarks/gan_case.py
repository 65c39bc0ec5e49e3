"""What the benchmarks of the GAN parts share."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Discriminator(nn.Module):
    """aw_sngan's, 390,417 parameters: seven spectrally normalised convolutions, a head, a projection of the label."""

    def __init__(self, normalise: Callable[[nn.Module], nn.Module]):
        super().__init__()
        torch.manual_seed(0)
        layers, channels = [], 3
        for width, kernel in zip((16, 16, 32, 32, 64, 64, 128), (3, 4, 3, 4, 3, 4, 3), strict=True):
            stride = 2 if kernel == 4 else 1
            layers += [normalise(nn.Conv2d(channels, width, kernel, stride, 1)), nn.LeakyReLU(0.2)]
            channels = width
        self.features = nn.Sequential(*layers, nn.Flatten())
        self.head = nn.Linear(2048, 1)
        self.projection = nn.Embedding(100, 2048)

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Logits [N]."""
        features = self.features(images)
        return self.head(features).squeeze(1) + (self.projection(labels) * features).sum(1)


def take_turns(
    variants: Mapping[str, tuple[Callable[[], None], Callable[[], None]]], rounds: int, warm_up: int = 5
) -> dict[str, list[float]]:
    """Seconds of each variant, (prepare, run), in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(warm_up + rounds):
        for name, (prepare, run) in variants.items():
            prepare()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            if number >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def median_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """The median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))
