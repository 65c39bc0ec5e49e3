"""Spectral normalisation in plain PyTorch: the definition that every kernel is held to.

Weights of equal shape are handled together by batched products, so that it costs less than a loop over layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def power_iterations(
    matrices: Sequence[torch.Tensor], vs: Sequence[torch.Tensor], n_power_iterations: int, eps: float
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Power iterations on matrices [H, W] from vs [W]: u ← W v/|W v|, then v ← Wᵀu/|Wᵀu|; us [H] and vs.

    Source: Miyato et al., Spectral Normalization for Generative Adversarial Networks, 2018, algorithm 1.
    """
    stacks = _stacks(matrices)
    us, vs = [], list(vs)
    for _ in range(n_power_iterations):
        us = _normalise(_products(stacks, vs, transposed=False), eps)
        vs = _normalise(_products(stacks, us, transposed=True), eps)
    return us, vs


def _stacks(matrices: Sequence[torch.Tensor]) -> list[tuple[list[int], torch.Tensor]]:
    """Indices of the matrices of each shape, and those as one tensor [G, H, W] ([H, W] of a single one)."""
    groups: dict[tuple, list[int]] = {}
    for index, matrix in enumerate(matrices):
        groups.setdefault((matrix.shape, matrix.dtype), []).append(index)
    return [
        (group, matrices[group[0]] if len(group) == 1 else torch.stack([matrices[i] for i in group]))
        for group in groups.values()
    ]


def _products(
    stacks: list[tuple[list[int], torch.Tensor]], vectors: list[torch.Tensor], *, transposed: bool
) -> list[torch.Tensor]:
    """W v of every matrix, or Wᵀv."""
    products = [None] * len(vectors)
    for group, stack in stacks:
        if transposed:
            stack = stack.mT
        if len(group) == 1:
            products[group[0]] = torch.mv(stack, vectors[group[0]])
            continue
        columns = torch.stack([vectors[i] for i in group]).unsqueeze(2)
        for i, product in zip(group, torch.bmm(stack, columns).squeeze(2).unbind(), strict=True):
            products[i] = product
    return products


def _normalise(vectors: list[torch.Tensor], eps: float) -> list[torch.Tensor]:
    """`F.normalize` of every vector."""
    norms = torch._foreach_norm(vectors)
    torch._foreach_clamp_min_(norms, eps)
    return list(torch._foreach_div(vectors, norms))


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
    with torch.autocast(weights[0].device.type, enabled=False):
        # The vectors' dtype is that of the arithmetic.
        wide = [weight.to(v.dtype) for weight, v in zip(weights, vs, strict=True)]
        matrices = [weight.flatten(1) for weight in wide]
        with torch.no_grad():
            if n_power_iterations:
                us, vs = power_iterations(matrices, vs, n_power_iterations, eps)
            else:
                # Copies: the caller may advance its vectors before the backward pass.
                us, vs = ([vector.clone() for vector in vectors] for vectors in (us, vs))
        sigmas = [torch.dot(u, torch.mv(matrix, v)) for matrix, u, v in zip(matrices, us, vs, strict=True)]
        normalised = torch._foreach_div(wide, sigmas)
        return (
            [value.to(weight.dtype) for value, weight in zip(normalised, weights, strict=True)],
            list(us),
            list(vs),
            [sigma.detach() for sigma in sigmas],
        )


class Normalised:
    """Normalised weights and all that their gradient needs; the counterpart of `fastcifar.ops.spectral.Normalised`."""

    def __init__(self, weights, dims, us, vs, sigmas):
        self.weights, self.dims, self.us, self.vs, self.sigmas = weights, dims, us, vs, sigmas

    def split(self) -> list[torch.Tensor]:
        """The normalised weights, a new view of each."""
        return [weight.detach() for weight in self.weights]

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
