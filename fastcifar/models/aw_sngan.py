"""aw-SN-GAN: class-conditional (or not) generator, spectrally normalised projection discriminator."""

from __future__ import annotations

import torch
from torch import nn

from fastcifar.models.gan import GAN, first_layer
from fastcifar.nn import BatchNormAct, spectral_norm
from fastcifar.nn.conditional import ConditionalBatchNormAct, ProjectionHead


class NormAct(nn.Module):
    """Batch norm, conditional where there are classes, and an activation; both take (x, labels)."""

    def __init__(self, channels: int, num_classes: int, activation: str, impl: str):
        super().__init__()
        if num_classes:
            self.norm = ConditionalBatchNormAct(channels, num_classes, activation, negative_slope=0.2, impl=impl)
        else:
            self.norm = BatchNormAct(channels, activation, negative_slope=0.2, impl=impl)
        self.conditional = num_classes > 0

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        if not self.conditional:
            return self.norm(x)
        if labels is None:
            raise ValueError("this generator is conditional: it needs labels [N]")
        return self.norm(x, labels)


class Generator(nn.Module):
    """z [N, latent_dim] → images [N, 3, 32, 32]: transposed convolutions 4×4, conditional batch norm, leaky ReLU."""

    def __init__(self, latent_dim: int, widths: tuple[int, ...], num_classes: int, impl: str):
        super().__init__()
        self.convolutions, self.norms = nn.ModuleList(), nn.ModuleList()
        inputs = latent_dim
        for index, outputs in enumerate(widths):
            stride, padding = (1, 0) if index == 0 else (2, 1)
            self.convolutions.append(nn.ConvTranspose2d(inputs, outputs, 4, stride, padding, bias=False))
            self.norms.append(NormAct(outputs, num_classes, "leaky_relu", impl))
            inputs = outputs
        self.to_image = nn.Conv2d(inputs, 3, 1, bias=False)

    def forward(self, z: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        x = self.norms[0](first_layer(z, self.convolutions[0]), labels)
        for convolution, norm in zip(self.convolutions[1:], self.norms[1:], strict=True):
            x = norm(convolution(x), labels)
        return torch.tanh(self.to_image(x))


class MinibatchDeviation(nn.Module):
    """Appends a channel with the mean standard deviation over groups of images: [N, C, H, W] → [N, C + 1, H, W].

    A group is of neighbours in the batch, so that any number of processes forms the same ones.

    Source: Karras et al., Progressive growing of GANs, 2018.
    """

    def __init__(self, group: int = 4):
        super().__init__()
        self.group = group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch = x.shape[0]
        group = next(size for size in range(min(self.group, batch), 0, -1) if batch % size == 0)
        grouped = x.float().reshape(batch // group, group, -1)
        deviation = (grouped.var(1, correction=0) + 1e-8).sqrt().mean(1)
        plane = deviation.repeat_interleave(group).to(x.dtype)[:, None, None, None].expand(-1, 1, *x.shape[2:])
        return torch.cat([x, plane], 1)


class Discriminator(nn.Module):
    """Images [N, 3, 32, 32] → logits [N]: seven spectrally normalised convolutions, leaky ReLU, projection head."""

    def __init__(self, width: int, num_classes: int, minibatch_deviation: bool):
        super().__init__()
        self.convolutions = nn.ModuleList()
        self.activation = nn.LeakyReLU(0.2, inplace=True)
        inputs = 3
        for factor, kernel_size in zip((1, 1, 2, 2, 4, 4, 8), (3, 4, 3, 4, 3, 4, 3), strict=True):
            stride = 2 if kernel_size == 4 else 1
            self.convolutions.append(spectral_norm(nn.Conv2d(inputs, factor * width, kernel_size, stride, 1)))
            inputs = factor * width
        self.deviation = MinibatchDeviation() if minibatch_deviation else None
        self.head = ProjectionHead(16 * (inputs + minibatch_deviation), num_classes)

    def forward(self, images: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        x = images
        for convolution in self.convolutions:
            x = self.activation(convolution(x))
        if self.deviation is not None:
            x = self.deviation(x)
        return self.head(x.flatten(1), labels)


def aw_sngan(
    num_classes: int = 100,
    conditional: bool = True,
    latent_dim: int = 128,
    width: int = 32,
    discriminator_width: int = 16,
    minibatch_deviation: bool = False,
    impl: str = "auto",
) -> GAN:
    """The published aw-SN-GAN: generator 549,216 and discriminator 390,417 parameters, with u and v 3,179 more.

    Source: Miyato et al., Spectral normalization for GANs, 2018; Zadorozhnyy, Cheng and Ye, Adaptive weighted
    discriminator for training GANs, CVPR 2021.
    """
    if min(latent_dim, width, discriminator_width) < 1:
        sizes = f"{latent_dim}, {width} and {discriminator_width}"
        raise ValueError(f"aw_sngan: latent_dim, width and discriminator_width must be ≥ 1, got {sizes}")
    classes = num_classes if conditional else 0
    widths = (4 * width, 2 * width, 2 * width, width)
    generator = Generator(latent_dim, widths, classes, impl)
    return GAN(generator, Discriminator(discriminator_width, classes, minibatch_deviation), latent_dim, classes)
