"""What the benchmarks of the GAN parts share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn


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


class Generator(nn.Module):
    """aw_sngan's out of torch.nn layers, as one would write it; 549,216 parameters."""

    def __init__(self) -> None:
        super().__init__()
        widths = (128, 128, 64, 64, 32)
        self.convolutions = nn.ModuleList(
            nn.ConvTranspose2d(a, b, 4, 1 if i == 0 else 2, 0 if i == 0 else 1, bias=False)
            for i, (a, b) in enumerate(zip(widths, widths[1:], strict=False))
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(width, affine=False) for width in widths[1:])
        self.tables = nn.ModuleList(nn.Embedding(100, 2 * width) for width in widths[1:])
        self.to_image = nn.Conv2d(widths[-1], 3, 1, bias=False)

    def forward(self, z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Images [N, 3, 32, 32]."""
        x = z[:, :, None, None]
        for convolution, norm, table in zip(self.convolutions, self.norms, self.tables, strict=True):
            gamma, beta = table(labels)[:, :, None, None].chunk(2, 1)
            x = nn.functional.leaky_relu(gamma * norm(convolution(x)) + beta, 0.2)
        return torch.tanh(self.to_image(x))


def weigh_by_tensors(
    parameters: Sequence[torch.Tensor],
    real: Sequence[torch.Tensor],
    fake: Sequence[torch.Tensor],
    s_r: torch.Tensor,
    s_f: torch.Tensor,
) -> None:
    """The table of the weights as one would write it first: Python loops, decisions on the host."""
    rr = sum((r * r).sum() for r in real) + 1e-4
    ff = sum((f * f).sum() for f in fake) + 1e-4
    rf = sum((r * f).sum() for r, f in zip(real, fake, strict=True)).item()
    s_r, s_f, r, f = s_r.item(), s_f.item(), math.sqrt(rr.item()), math.sqrt(ff.item())
    w_r, w_f = 1 / r, 1 / f
    if s_r < 0.5 or s_r < s_f - 0.05:
        w_f = -rf / (f * f * r) if rf <= 0 else 0.0
    elif s_r > 0.75 and s_r > s_f - 0.05:
        w_r = -rf / (r * r * f) if rf <= 0 else 0.0
    for parameter, real_part, fake_part in zip(parameters, real, fake, strict=True):
        parameter.grad = (w_r + 0.05) * real_part + (w_f + 0.05) * fake_part
