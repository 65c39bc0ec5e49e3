"""Deep convolutional GAN for 32×32 images: 370,624 + 167,808 parameters."""

from __future__ import annotations

import torch
from torch import nn

from fastcifar.models.gan import GAN, first_layer
from fastcifar.nn import BatchNormAct


class Generator(nn.Module):
    """z [N, latent_dim] → images [N, 3, 32, 32]: transposed convolutions 4×4, batch norm, ReLU, tanh."""

    def __init__(self, latent_dim: int, widths: tuple[int, ...], impl: str):
        super().__init__()
        self.convolutions, self.norms = nn.ModuleList(), nn.ModuleList()
        inputs = latent_dim
        for index, outputs in enumerate(widths):
            stride, padding = (1, 0) if index == 0 else (2, 1)
            self.convolutions.append(nn.ConvTranspose2d(inputs, outputs, 4, stride, padding, bias=False))
            self.norms.append(BatchNormAct(outputs, "relu", impl=impl))
            inputs = outputs
        self.to_image = nn.ConvTranspose2d(inputs, 3, 4, 2, 1, bias=False)

    def forward(self, z: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        x = self.norms[0](first_layer(z, self.convolutions[0]))
        for convolution, norm in zip(self.convolutions[1:], self.norms[1:], strict=True):
            x = norm(convolution(x))
        return torch.tanh(self.to_image(x))


class Discriminator(nn.Module):
    """Images [N, 3, 32, 32] → logits [N]: convolutions 4×4 of stride 2, batch norm from the second, leaky ReLU 0.2."""

    def __init__(self, widths: tuple[int, ...], impl: str):
        super().__init__()
        self.first = nn.Conv2d(3, widths[0], 4, 2, 1, bias=False)
        self.activation = nn.LeakyReLU(0.2)
        self.convolutions, self.norms = nn.ModuleList(), nn.ModuleList()
        for inputs, outputs in zip(widths, widths[1:], strict=False):
            self.convolutions.append(nn.Conv2d(inputs, outputs, 4, 2, 1, bias=False))
            self.norms.append(BatchNormAct(outputs, "leaky_relu", negative_slope=0.2, impl=impl))
        self.last = nn.Conv2d(widths[-1], 1, 4, bias=False)

    def forward(self, images: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        x = self.activation(self.first(images))
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = norm(convolution(x))
        return self.last(x).flatten()


def dcgan(num_classes: int = 0, latent_dim: int = 100, width: int = 32, impl: str = "auto") -> GAN:
    """DCGAN, never conditional: `num_classes` is taken for the sake of the registry and left alone.

    Source: Radford, Metz and Chintala, Unsupervised representation learning with deep convolutional GANs, 2016.
    """
    if latent_dim < 1 or width < 1:
        raise ValueError(f"dcgan: latent_dim and width must be ≥ 1, got {latent_dim} and {width}")
    widths = (4 * width, 2 * width, width)
    gan = GAN(Generator(latent_dim, widths, impl), Discriminator(widths[::-1], impl), latent_dim, 0)
    for module in gan.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(module.weight, 0.0, 0.02)
    return gan
