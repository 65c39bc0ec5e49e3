"""Spectral normalisation in plain PyTorch: the definition that every kernel is held to.

Weights of equal shape are handled together by batched products, so that it costs less than a loop over layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def iterate(
    matrices: torch.Tensor, v: torch.Tensor, n_power_iterations: int, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Power iterations on matrices [G, H, W] from v [G, W]: u ← W v/|W v|, v ← Wᵀu/|Wᵀu|, u [G, H] first.

    Source: Miyato et al., Spectral Normalization for Generative Adversarial Networks, 2018, algorithm 1.
    """
    u = None
    for _ in range(n_power_iterations):
        u = F.normalize(_products(matrices, v), dim=1, eps=eps)
        v = F.normalize(_products(matrices.mT, u), dim=1, eps=eps)
    return u, v


def _products(matrices: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """[G, H, W] times [G, W] → [G, H]."""
    if matrices.shape[0] == 1:
        return torch.mv(matrices[0], vectors[0]).unsqueeze(0)
    return torch.bmm(matrices, vectors.unsqueeze(2)).squeeze(2)


def _groups(weights: Sequence[torch.Tensor]) -> list[list[int]]:
    """Indices of weights whose matrices can be stacked."""
    groups: dict[tuple, list[int]] = {}
    for index, weight in enumerate(weights):
        groups.setdefault((weight.shape[0], weight.numel(), weight.dtype, weight.device), []).append(index)
    return list(groups.values())


def _stack(tensors: list[torch.Tensor]) -> torch.Tensor:
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)


def spectral_normalize(
    weights: Sequence[torch.Tensor],
    us: Sequence[torch.Tensor],
    vs: Sequence[torch.Tensor],
    *,
    n_power_iterations: int = 1,
    eps: float = 1e-12,
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """W/σ, u, v and σ of every weight; shapes as in `fastcifar.functional.spectral_normalize`.

    Differentiable, twice, with respect to the weights; u and v are constants.
    """
    count = len(weights)
    normalised, new_us, new_vs, sigmas = [None] * count, list(us), list(vs), [None] * count
    with torch.autocast(weights[0].device.type, enabled=False):
        for group in _groups(weights):
            # The vectors' dtype is that of the arithmetic.
            dtype = us[group[0]].dtype
            matrices = _stack([weights[i].to(dtype).flatten(1) for i in group])
            with torch.no_grad():
                if n_power_iterations:
                    u, v = iterate(matrices, _stack([vs[i] for i in group]), n_power_iterations, eps)
                else:
                    # Copies: the caller may advance its vectors before the backward pass.
                    u, v = (_stack([vectors[i].clone() for i in group]) for vectors in (us, vs))
            sigma = (u * _products(matrices, v)).sum(1)
            for position, i in enumerate(group):
                value = sigma[position]
                normalised[i] = (weights[i].to(dtype) / value).to(weights[i].dtype)
                new_us[i], new_vs[i], sigmas[i] = u[position], v[position], value.detach()
    return normalised, new_us, new_vs, sigmas


class Normalised:
    """Normalised weights and all that their gradient needs; the counterpart of `fastcifar.ops.spectral.Normalised`."""

    def __init__(self, weights, dims, us, vs, sigmas):
        self.weights, self.dims, self.us, self.vs, self.sigmas = weights, dims, us, vs, sigmas

    def gradients(self, gradients: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """dW = (dW̄ − ⟨dW̄, W̄⟩·u vᵀ)/σ for every dW̄ that is not None; shapes and dtypes of the weights."""
        return [
            None if gradient is None else self._gradient(index, gradient) for index, gradient in enumerate(gradients)
        ]

    def _gradient(self, index, gradient):
        u, v, sigma, dim = self.us[index], self.vs[index], self.sigmas[index], self.dims[index]
        wide = gradient.to(u.dtype).movedim(dim, 0)
        inner = (wide * self.weights[index].to(u.dtype).movedim(dim, 0)).sum()
        rank_one = torch.outer(u, v).view(wide.shape)
        return ((wide - inner * rank_one) / sigma).movedim(0, dim).to(gradient.dtype)


@torch.no_grad()
def advance(
    weights: Sequence[torch.Tensor],
    dims: Sequence[int],
    us: Sequence[torch.Tensor],
    vs: Sequence[torch.Tensor],
    *,
    n_power_iterations: int,
    eps: float,
) -> Normalised:
    """Normalises the weights and moves us and vs in place; `dims` holds the dimension of each weight's rows."""
    rows_first = [weight.detach().movedim(dim, 0) for weight, dim in zip(weights, dims, strict=True)]
    normalised, new_us, new_vs, sigmas = spectral_normalize(
        rows_first, us, vs, n_power_iterations=n_power_iterations, eps=eps
    )
    if n_power_iterations:
        torch._foreach_copy_([*us, *vs], [*new_us, *new_vs])
    restored = [weight.movedim(0, dim) for weight, dim in zip(normalised, dims, strict=True)]
    return Normalised(restored, dims, new_us, new_vs, sigmas)
