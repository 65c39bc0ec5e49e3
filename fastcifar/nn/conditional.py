"""Batch norm and discriminator head that know the class."""

from __future__ import annotations

import torch
from torch import nn

from fastcifar import functional, reference
from fastcifar.nn.batch_norm import BatchNormAct, advance_batch_norm


class ConditionalBatchNormAct(BatchNormAct):
    """act(γ_y·ŷ + β_y): batch norm without an affine map of its own, γ and β looked up by class, then an activation.

    Args:
        num_features: number of channels, C.
        num_classes: rows of the table `embedding` [num_classes, 2·C], γ (first, 1 at the start) and β (0).
        activation, eps, momentum, impl, negative_slope, process_group: as in `BatchNormAct`.

    Raises:
        ValueError: an option that is out of range; the message names it.

    Source: Dumoulin et al., A learned representation for artistic style, 2017; Miyato and Koyama, cGANs with
    projection discriminator, 2018.
    """

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        activation: str = "leaky_relu",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        impl: str = "auto",
        *,
        negative_slope: float = 0.2,
    ):
        super().__init__(
            num_features, activation, eps, momentum, affine=False, impl=impl, negative_slope=negative_slope
        )
        if num_classes < 1:
            raise ValueError(f"{type(self).__name__}: num_classes must be ≥ 1, got {num_classes}")
        self.embedding = nn.Embedding(num_classes, 2 * num_features)
        with torch.no_grad():
            self.embedding.weight[:, :num_features] = 1.0
            self.embedding.weight[:, num_features:] = 0.0

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """x [N, C, H, W] and labels int64 [N] → [N, C, H, W]."""
        state = advance_batch_norm(self)
        normalised = functional.batch_norm_act(
            x, None, None, state.running_mean, state.running_var, activation="none", training=state.training,
            momentum=state.momentum, eps=self.eps, process_group=self.process_group if self.training else None,
            impl=self.impl,
        )  # fmt: skip
        gamma, beta = self.embedding(labels).to(normalised.dtype)[:, :, None, None].chunk(2, 1)
        # The large tensor first: results take its memory format.
        value = (normalised * gamma).add_(beta)
        return reference.activate(value, self.activation, self.negative_slope)


class ProjectionHead(nn.Module):
    """ψ(φ) + ⟨V_y, φ⟩: one logit for each image from its features [N, features].

    Args:
        features: length of φ.
        num_classes: rows of V; 0 leaves the second term out.

    Source: Miyato and Koyama, cGANs with projection discriminator, 2018.
    """

    def __init__(self, features: int, num_classes: int):
        super().__init__()
        self.linear = nn.Linear(features, 1)
        self.projection = nn.Embedding(num_classes, features) if num_classes else None

    def forward(self, features: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """features [N, F] and, where there are classes, labels int64 [N] → logits [N]."""
        logits = self.linear(features).squeeze(1)
        if self.projection is None:
            return logits
        if labels is None:
            raise ValueError(f"{type(self).__name__}: labels are needed, this discriminator is conditional")
        return logits + (self.projection(labels) * features).sum(1)
