"""Mean and covariance of features as they stream by, and the Fréchet distance between two of them."""

from __future__ import annotations

import torch


class FeatureStatistics:
    """n, Σx and Σ(x − a)(x − a)ᵀ in float64, for features [N, D] that come in batches; a is the first batch's mean.

    Args:
        dimension: D.
        device: where the sums are kept.
    """

    def __init__(self, dimension: int, device: torch.device | str = "cpu"):
        self.count = 0
        self._shift: torch.Tensor | None = None
        self._sum = torch.zeros(dimension, dtype=torch.float64, device=device)
        self._products = torch.zeros(dimension, dimension, dtype=torch.float64, device=device)

    def update(self, features: torch.Tensor) -> None:
        """Takes in features [n, D] of any floating dtype.

        Raises:
            ValueError: another D.
        """
        if features.dim() != 2 or features.shape[1] != len(self._sum):
            raise ValueError(f"features must be [n, {len(self._sum)}], got {tuple(features.shape)}")
        if len(features) == 0:
            return
        features = features.detach().to(self._sum)
        if self._shift is None:
            self._shift = features.mean(0)
        centred = features - self._shift
        self.count += len(features)
        self._sum += centred.sum(0)
        self._products.addmm_(centred.T, centred)

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that was gathered, for `load_state`.

        Raises:
            ValueError: no features yet.
        """
        self._need(1)
        count = torch.tensor(self.count, dtype=torch.int64)
        return {"count": count, "shift": self._shift, "sum": self._sum, "products": self._products}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Takes over what `state` gave.

        Raises:
            ValueError: of another D, or incomplete.
        """
        size = len(self._sum)
        for name, shape in (("count", ()), ("shift", (size,)), ("sum", (size,)), ("products", (size, size))):
            if name not in state or tuple(state[name].shape) != shape:
                raise ValueError(f"statistics of {size} features need {name} {list(shape)}")
        self.count = int(state["count"])
        self._shift = state["shift"].to(self._sum)
        self._sum.copy_(state["sum"])
        self._products.copy_(state["products"])

    @property
    def mean(self) -> torch.Tensor:
        """[D], float64.

        Raises:
            ValueError: no features yet.
        """
        self._need(1)
        return self._shift + self._sum / self.count

    @property
    def covariance(self) -> torch.Tensor:
        """[D, D], float64, divided by n − 1.

        Raises:
            ValueError: fewer than two features.
        """
        self._need(2)
        return (self._products - torch.outer(self._sum, self._sum) / self.count) / (self.count - 1)

    def _need(self, least: int) -> None:
        if self.count < least:
            raise ValueError(f"needs at least {least} images, has seen {self.count}")


def _root(covariance: torch.Tensor) -> torch.Tensor:
    """L with L Lᵀ = covariance: Cholesky's, or the symmetric root of a singular matrix."""
    factor, info = torch.linalg.cholesky_ex(covariance)
    if int(info) == 0:
        return factor
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt()


def frechet_distance(
    mean_1: torch.Tensor, covariance_1: torch.Tensor, mean_2: torch.Tensor, covariance_2: torch.Tensor
) -> float:
    """|μ₁ − μ₂|² + tr(S₁ + S₂ − 2·(S₁S₂)^½) of two normal distributions.

    With S₁ = L Lᵀ the trace of the root is Σ√λ over the eigenvalues of LᵀS₂L, which are those of S₁S₂: nothing
    complex, nothing of SciPy.

    Args:
        mean_1, mean_2: [D].
        covariance_1, covariance_2: [D, D].

    Raises:
        ValueError: sizes that do not fit.

    Source: Dowson and Landau, The Fréchet distance between multivariate normal distributions, 1982.
    """
    size = len(mean_1)
    for name, tensor, shape in (
        ("mean_2", mean_2, (size,)), ("covariance_1", covariance_1, (size, size)),
        ("covariance_2", covariance_2, (size, size)),
    ):  # fmt: skip
        if tuple(tensor.shape) != shape:
            raise ValueError(f"frechet_distance: {name} must be {list(shape)}, got {list(tensor.shape)}")
    mean_1, covariance_1, mean_2, covariance_2 = (
        torch.as_tensor(t, dtype=torch.float64) for t in (mean_1, covariance_1, mean_2, covariance_2)
    )
    root = _root(covariance_1)
    eigenvalues = torch.linalg.eigvalsh(root.T @ covariance_2 @ root).clamp(min=0)
    distance = (mean_1 - mean_2).square().sum() + covariance_1.trace() + covariance_2.trace()
    return float(distance - 2 * eigenvalues.sqrt().sum())
