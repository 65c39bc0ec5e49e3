"""Metrics of sets of features: kernel distance, precision, recall, density, coverage."""

from __future__ import annotations

import torch

_BLOCK = 1000
# k of the published figures.
NEIGHBOURS = 5


def kernel_distance(
    real: torch.Tensor, generated: torch.Tensor, *, subsets: int = 100, size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Squared maximum mean discrepancy with the kernel (⟨x, y⟩/D + 1)³, unbiased: mean and deviation over subsets.

    Args:
        real, generated: features [N, D] and [M, D].
        subsets, size: so many random subsets of so many features of each set (or all, where there are fewer).
        seed: of the subsets.

    Raises:
        ValueError: fewer than two features.

    Source: Bińkowski et al., Demystifying MMD GANs, 2018.
    """
    size = min(size, len(real), len(generated))
    if size < 2:
        raise ValueError(f"kernel_distance: needs two features of each, got {len(real)} and {len(generated)}")
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(subsets):
        x, y = (
            features[torch.randperm(len(features), generator=generator)[:size].to(features.device)].double()
            for features in (real, generated)
        )
        xx, yy, xy = (((a @ b.T) / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (size * (size - 1))
        values.append(float(within - 2 * xy.mean()))
    found = torch.tensor(values, dtype=torch.float64)
    return float(found.mean()), float(found.std(correction=0))


def _distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _radii(features: torch.Tensor, k: int) -> torch.Tensor:
    """The distance of each feature to its k-th nearest other one, [N]."""
    blocks = [_distances(part, features).kthvalue(k + 1, dim=1).values for part in features.split(_BLOCK)]
    return torch.cat(blocks)


def precision_recall_density_coverage(
    real: torch.Tensor, generated: torch.Tensor, *, neighbours: int = NEIGHBOURS
) -> dict[str, float]:
    """Precision, recall, density and coverage by balls to the k-th nearest neighbour.

    Args:
        real, generated: features [N, D] and [M, D].
        neighbours: k.

    Returns:
        "precision" (generated features in some real ball), "recall" (the other way round), "density" (real balls a
        generated feature lies in, over k), "coverage" (real balls that hold a generated feature).

    Raises:
        ValueError: not more than k features.

    Source: Kynkäänniemi et al., 2019; Naeem et al., Reliable fidelity and diversity metrics, 2020.
    """
    if min(len(real), len(generated)) <= neighbours:
        raise ValueError(
            f"precision_recall_density_coverage: needs more than {neighbours} features of each, got {len(real)} and "
            f"{len(generated)}"
        )
    real, generated = real.double(), generated.double()
    real_radii, generated_radii = _radii(real, neighbours), _radii(generated, neighbours)
    inside = torch.zeros(len(generated), dtype=torch.int64, device=real.device)  # real balls around each
    recalled, covered = [], []
    for part, radii in zip(real.split(_BLOCK), real_radii.split(_BLOCK), strict=True):
        distances = _distances(part, generated)  # [block, M]
        within = distances <= radii[:, None]
        inside += within.sum(0)
        covered.append(within.any(1))
        recalled.append((distances <= generated_radii[None, :]).any(1))
    return {
        "precision": float((inside > 0).double().mean()),
        "recall": float(torch.cat(recalled).double().mean()),
        "density": float(inside.double().mean() / neighbours),
        "coverage": float(torch.cat(covered).double().mean()),
    }
