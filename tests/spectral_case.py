"""What the tests of the spectral norm share."""

import torch
from torch import nn

from fastcifar.reference_spectral import power_iterations

# Layers of every kind: what makes one, and the dimension of its weight's rows.
LAYERS = {
    "linear": lambda: nn.Linear(7, 5),
    "column": lambda: nn.Linear(1, 6),
    "row": lambda: nn.Linear(6, 1),
    "conv1d": lambda: nn.Conv1d(3, 5, 3),
    "conv2d": lambda: nn.Conv2d(4, 6, 3),
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "conv3d": lambda: nn.Conv3d(2, 3, (1, 2, 3)),
    "transposed1d": lambda: nn.ConvTranspose1d(3, 5, 4),
    "transposed2d": lambda: nn.ConvTranspose2d(4, 3, 2),
    "transposed3d": lambda: nn.ConvTranspose3d(2, 3, 2),
    "embedding": lambda: nn.Embedding(9, 4),
}


class Discriminator(nn.Module):
    """aw_sngan's, conditional: seven spectrally normalised convolutions, a head and a projection without."""

    def __init__(self, spectral_norm, width=16):
        super().__init__()
        torch.manual_seed(3)
        layers, channels = [], 3
        factors = (1, 1, 2, 2, 4, 4, 8)
        for factor, kernel in zip(factors, (3, 4, 3, 4, 3, 4, 3), strict=True):
            convolution = nn.Conv2d(channels, factor * width, kernel, 2 if kernel == 4 else 1, 1)
            layers += [spectral_norm(convolution), nn.LeakyReLU(0.2)]
            channels = factor * width
        self.features = nn.Sequential(*layers, nn.Flatten())
        self.head = nn.Linear(16 * channels, 1)
        self.projection = nn.Embedding(100, 16 * channels)

    def forward(self, images, labels):
        features = self.features(images)
        return self.head(features).squeeze(1) + (self.projection(labels) * features).sum(1)


def norms(model):
    """The parametrisations of spectrally normalised layers, by their names."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "_u")}


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def unit(size, seed):
    vector = draw(size, dtype=torch.float64, seed=seed)
    return vector / vector.norm()


# name → (shape, dimension of the rows, memory format): odd sizes, all layouts.
WEIGHTS = {
    "linear": ((7, 5), 0, torch.contiguous_format),
    "conv": ((6, 5, 3, 2), 0, torch.contiguous_format),
    "conv channels-last": ((6, 5, 3, 2), 0, torch.channels_last),
    "transposed": ((5, 6, 4, 3), 1, torch.contiguous_format),
    "transposed channels-last": ((5, 6, 4, 3), 1, torch.channels_last),
    "conv3d channels-last": ((3, 4, 2, 2, 2), 0, torch.channels_last_3d),
    "one row": ((1, 9), 0, torch.contiguous_format),
    "one column": ((9, 1), 0, torch.contiguous_format),
    "wide": ((3, 1100), 0, torch.contiguous_format),
    "tall": ((1100, 3), 0, torch.contiguous_format),
    "more than a block": ((72, 15, 3, 3), 0, torch.contiguous_format),
}


def operands(dtype, kinds=WEIGHTS):
    """Weights (rows first), us, vs and gradients of W/σ; the numbers are the same in every dtype of that precision.

    u and v are some way along: with random ones σ = uᵀW v would be a small difference of large numbers.
    """
    wide = torch.promote_types(dtype, torch.float32)
    weights, us, vs, gradients = [], [], [], []
    for index, kind in enumerate(kinds):
        shape, dim, memory_format = WEIGHTS[kind]
        weight = draw(*shape, dtype=torch.float16, seed=index).to(dtype).to(memory_format=memory_format)
        weight = weight.movedim(dim, 0)
        matrix = weight.double().flatten(1)
        u, v = power_iterations([matrix], [unit(matrix.shape[1], 200 + index)], 2, 1e-12)
        weights.append(weight.detach().requires_grad_())
        us.append(u[0].float().to(wide))
        vs.append(v[0].float().to(wide))
        gradients.append(draw(*weight.shape, dtype=torch.float16, seed=300 + index).to(dtype))
    return weights, us, vs, gradients
