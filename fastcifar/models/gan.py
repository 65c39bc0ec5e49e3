"""What every GAN here is: a generator, a discriminator, and what training needs to know of them."""

from __future__ import annotations

import torch
from torch import nn


def first_layer(z: torch.Tensor, convolution: nn.ConvTranspose2d) -> torch.Tensor:
    """A transposed convolution of z [N, Z] seen as 1×1 images, [N, C, K, K]: the same as a product, and faster."""
    channels, size = convolution.out_channels, convolution.kernel_size
    product = torch.nn.functional.linear(z, convolution.weight.flatten(1).t())
    return product.view(-1, channels, *size).contiguous(memory_format=torch.channels_last)


class GAN(nn.Module):
    """A generator and a discriminator.

    `generator(z [N, latent_dim], labels)` gives images [N, 3, 32, 32] in [−1, 1], `discriminator(images, labels)` raw
    logits [N]; labels int64 [N], or None where `num_classes` is 0 (not conditional).
    """

    def __init__(self, generator: nn.Module, discriminator: nn.Module, latent_dim: int, num_classes: int):
        super().__init__()
        self.generator, self.discriminator = generator, discriminator
        self.latent_dim, self.num_classes = latent_dim, num_classes

    @property
    def conditional(self) -> bool:
        """Whether both networks take labels."""
        return self.num_classes > 0

    def forward(self, z: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """The generator's images."""
        return self.generator(z, labels)
