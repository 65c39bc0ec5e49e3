"""Larger and lighter relatives of aw_sngan: residual blocks, and depthwise blocks with skip-layer excitation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from fastcifar.models.aw_sngan import Discriminator, MinibatchDeviation, NormAct
from fastcifar.models.gan import GAN, first_layer
from fastcifar.nn import DepthwiseConvBNAct, spectral_norm
from fastcifar.nn.conditional import ProjectionHead


class UpBlock(nn.Module):
    """[norm → ReLU → 2× → conv3 → norm → ReLU → conv3] + 1×1 of the input, doubling height and width."""

    def __init__(self, inputs: int, outputs: int, num_classes: int, impl: str):
        super().__init__()
        self.norm1 = NormAct(inputs, num_classes, "relu", impl)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = NormAct(outputs, num_classes, "relu", impl)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        h = self.conv1(F.interpolate(self.norm1(x, labels), scale_factor=2))
        # 1×1 before enlarging gives the same as after it, for a quarter of the work.
        return self.conv2(self.norm2(h, labels)) + F.interpolate(self.shortcut(x), scale_factor=2)


class ResidualGenerator(nn.Module):
    """z [N, latent_dim] → images [N, 3, 32, 32]: three residual blocks that double the size from 4×4."""

    def __init__(self, latent_dim: int, width: int, num_classes: int, impl: str):
        super().__init__()
        self.width = width
        self.first = nn.Linear(latent_dim, 16 * width)
        self.blocks = nn.ModuleList(UpBlock(width, width, num_classes, impl) for _ in range(3))
        self.norm = NormAct(width, 0, "relu", impl)
        self.to_image = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, z: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        x = self.first(z).view(-1, self.width, 4, 4).contiguous(memory_format=torch.channels_last)
        for block in self.blocks:
            x = block(x, labels)
        return torch.tanh(self.to_image(self.norm(x, None)))


class DownBlock(nn.Module):
    """[ReLU → conv3 → ReLU → conv3 (→ 2× average)] + shortcut; the first block of a network has no first ReLU."""

    def __init__(self, inputs: int, outputs: int, down: bool, first: bool = False):
        super().__init__()
        self.conv1 = spectral_norm(nn.Conv2d(inputs, outputs, 3, padding=1))
        self.conv2 = spectral_norm(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.shortcut = spectral_norm(nn.Conv2d(inputs, outputs, 1)) if down or inputs != outputs else nn.Identity()
        self.down, self.first = down, first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv2(F.relu(self.conv1(x if self.first else F.relu(x))))
        if not self.down:
            return h + self.shortcut(x)
        return F.avg_pool2d(h, 2) + self.shortcut(F.avg_pool2d(x, 2))


class ResidualDiscriminator(nn.Module):
    """Images [N, 3, 32, 32] → logits [N]: four residual blocks, global sum, projection head."""

    def __init__(self, width: int, num_classes: int, minibatch_deviation: bool):
        super().__init__()
        self.blocks = nn.Sequential(
            DownBlock(3, width, True, first=True), DownBlock(width, width, True),
            DownBlock(width, width, False), DownBlock(width, width, False),
        )  # fmt: skip
        self.deviation = MinibatchDeviation() if minibatch_deviation else None
        self.head = ProjectionHead(width + minibatch_deviation, num_classes)

    def forward(self, images: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        x = F.relu(self.blocks(images))
        if self.deviation is not None:
            x = self.deviation(x)
        return self.head(x.sum((2, 3)), labels)


class SkipExcitation(nn.Module):
    """Scales the channels of a large map [N, C, H, W] by a gate computed from a small one [N, c, h, w].

    Source: Liu et al., Towards faster and stabilized GAN training for high-fidelity few-shot image synthesis, 2021.
    """

    def __init__(self, small_channels: int, channels: int):
        super().__init__()
        self.squeeze = nn.Conv2d(small_channels, channels, 4)
        self.excite = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor, small: torch.Tensor) -> torch.Tensor:
        gate = self.squeeze(F.adaptive_avg_pool2d(small, 4))
        return x * torch.sigmoid(self.excite(F.silu(gate)))


class LightGenerator(nn.Module):
    """z [N, latent_dim] → images [N, 3, 32, 32]: depthwise-separable blocks, the last gated by the first map."""

    def __init__(self, latent_dim: int, width: int, num_classes: int, impl: str):
        super().__init__()
        sizes = (4 * width, 2 * width, 2 * width, width)
        self.first = nn.ConvTranspose2d(latent_dim, sizes[0], 4, bias=False)
        self.norm = NormAct(sizes[0], num_classes, "leaky_relu", impl)
        self.depthwise, self.pointwise, self.norms = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for inputs, outputs in zip(sizes, sizes[1:], strict=False):
            self.depthwise.append(DepthwiseConvBNAct(inputs, 5, activation="none", impl=impl))
            self.pointwise.append(nn.Conv2d(inputs, outputs, 1, bias=False))
            self.norms.append(NormAct(outputs, num_classes, "leaky_relu", impl))
        self.excitation = SkipExcitation(sizes[0], sizes[-1])
        self.to_image = nn.Conv2d(sizes[-1], 3, 3, padding=1, bias=False)

    def forward(self, z: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        first = x = self.norm(first_layer(z, self.first), labels)
        for depthwise, pointwise, norm in zip(self.depthwise, self.pointwise, self.norms, strict=True):
            x = norm(pointwise(depthwise(F.interpolate(x, scale_factor=2))), labels)
        return torch.tanh(self.to_image(self.excitation(x, first)))


def aw_sngan_res(
    num_classes: int = 100,
    conditional: bool = True,
    latent_dim: int = 128,
    width: int = 256,
    discriminator_width: int = 128,
    minibatch_deviation: bool = False,
    impl: str = "auto",
) -> GAN:
    """Residual SN-GAN for 32×32 images, with a projection discriminator where it is conditional.

    Source: Miyato et al., Spectral normalization for GANs, 2018, table 4.
    """
    _check("aw_sngan_res", latent_dim, width, discriminator_width)
    classes = num_classes if conditional else 0
    generator = ResidualGenerator(latent_dim, width, classes, impl)
    return GAN(generator, ResidualDiscriminator(discriminator_width, classes, minibatch_deviation), latent_dim, classes)


def aw_sngan_light(
    num_classes: int = 100,
    conditional: bool = True,
    latent_dim: int = 128,
    width: int = 32,
    discriminator_width: int = 16,
    minibatch_deviation: bool = False,
    impl: str = "auto",
) -> GAN:
    """aw_sngan with a generator of depthwise-separable 5×5 blocks and skip-layer excitation."""
    _check("aw_sngan_light", latent_dim, width, discriminator_width)
    classes = num_classes if conditional else 0
    generator = LightGenerator(latent_dim, width, classes, impl)
    return GAN(generator, Discriminator(discriminator_width, classes, minibatch_deviation), latent_dim, classes)


def _check(name: str, *sizes: int) -> None:
    if min(sizes) < 1:
        raise ValueError(f"{name}: latent_dim, width and discriminator_width must be ≥ 1, got {sizes}")
