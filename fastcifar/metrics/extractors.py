"""Networks whose features images are compared in."""

from __future__ import annotations

import numpy
import torch
from torch import nn


class ClassifierFeatures:
    """What the last linear layer of a classifier sees. Figures carry the classifier's name: none of them is an FID.

    Args:
        network: a classifier of images [N, 3, H, W], on its device.
        mean, std: of its normalisation, each three numbers for values in [0, 1].
        name, digest: how results call the network, and the hash of its tensors.

    Attributes:
        dimension: D. device: of network and features. resize: what is done to the images' size, "none".
        settings: what else than `digest` and images its features depend on.

    Raises:
        ValueError: a network without a linear layer.
    """

    resize = "none"

    def __init__(self, network: nn.Module, mean, std, *, name: str, digest: str):
        layers = [module for module in network.modules() if isinstance(module, nn.Linear)]
        if not layers:
            raise ValueError(f"{name} has no linear layer, so no features before it")
        self.network, self.name, self.digest = network.eval(), name, digest
        self.dimension = layers[-1].in_features
        self.device = layers[-1].weight.device
        self._mean, self._std = (
            torch.as_tensor(values, dtype=torch.float32, device=self.device).view(3, 1, 1) for values in (mean, std)
        )
        self.settings = f"{[float(m) for m in mean]} {[float(s) for s in std]}"
        self._seen: list[torch.Tensor] = []
        layers[-1].register_forward_pre_hook(lambda module, inputs: self._seen.append(inputs[0]))

    @torch.no_grad()
    def __call__(self, images: numpy.ndarray) -> torch.Tensor:
        """Features [N, D], float32, of images uint8 [N, H, W, 3]."""
        pixels = torch.from_numpy(numpy.ascontiguousarray(images)).to(self.device).permute(0, 3, 1, 2)
        self._seen.clear()
        self.network((pixels.float() / 255 - self._mean) / self._std)
        return self._seen.pop().float()
