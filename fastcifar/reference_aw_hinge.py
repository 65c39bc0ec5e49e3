"""The adaptive-weighted hinge in plain PyTorch: the definition that the compiled code is held to.

Runs on every device and in every floating-point dtype, and never makes the host wait for the device. The three phases
`hinge_terms`, `gradient_weights` and `combine_` have the signatures of their counterparts in `fastcifar.ops.aw_hinge`.

Source: Zadorozhnyy, Cheng, Ye, Adaptive Weighted Discriminator for Training Generative Adversarial Networks, CVPR
2021. Where its text and its code differ (the 1e-4 in the squared norms, ≤ against <) this follows the code.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

SQUARED_NORM_FLOOR = 1e-4


def adaptive_weights(
    rr: torch.Tensor,
    ff: torch.Tensor,
    rf: torch.Tensor,
    s_r: torch.Tensor,
    s_f: torch.Tensor,
    *,
    alpha1: float = 0.5,
    alpha2: float = 0.75,
    delta: float = 0.05,
    epsilon: float = 0.05,
    normalized: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights w_r and w_f of the two gradients, chosen on the device.

    Args:
        rr, ff: ⟨g_r, g_r⟩ + 1e-4 and ⟨g_f, g_f⟩ + 1e-4, of one shape and floating-point dtype.
        rf: ⟨g_r, g_f⟩.
        s_r, s_f: mean σ(D(x)) and mean σ(D(G(z))).
        alpha1, alpha2, delta: thresholds of the scores.
        epsilon: added to both weights.
        normalized: scale by the norms of the gradients.

    Returns:
        (w_r, w_f), of the shape and dtype of `rr`.
    """
    unit_real = rr.rsqrt() if normalized else torch.ones_like(rr)
    unit_fake = ff.rsqrt() if normalized else torch.ones_like(ff)
    obtuse = rf <= 0
    zero = torch.zeros_like(rf)
    favour_real = (s_r < alpha1) | (s_r < s_f - delta)
    favour_fake = ~favour_real & (s_r > alpha2) & (s_r > s_f - delta)
    weight_real = torch.where(favour_fake, torch.where(obtuse, -rf / rr * unit_fake, zero), unit_real)
    weight_fake = torch.where(favour_real, torch.where(obtuse, -rf / ff * unit_real, zero), unit_fake)
    return weight_real + epsilon, weight_fake + epsilon


def hinge_terms(
    real_logits: torch.Tensor,
    fake_logits: torch.Tensor,
    *,
    counts: torch.Tensor | None = None,
    scale: float = 1.0,
    device_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hinge losses, score means and the gradients of the losses with respect to the logits.

    Args:
        real_logits, fake_logits: any shapes, one floating-point dtype.
        counts: float64 [2], the numbers of real and fake logits to divide by; None for those given here.
        scale, device_scale: the gradients are multiplied by both (`device_scale`: float32 [], or None for 1).

    Returns:
        terms float64 [4]: L_r, L_f, s_r, s_f; the two gradients, of the shapes and dtype of the logits.
    """
    # A host list made into a tensor would be a copy that cannot be captured in a CUDA graph.
    totals = (real_logits.numel(), fake_logits.numel()) if counts is None else counts.unbind()
    factor = scale if device_scale is None else device_scale.double() * scale
    losses, scores, gradients = [], [], []
    for logits, sign, total in zip((real_logits, fake_logits), (-1.0, 1.0), totals, strict=True):
        x = logits.detach().double()
        margin = 1 + sign * x
        losses.append(margin.relu().sum() / total)
        scores.append(x.sigmoid().sum() / total)
        derivative = torch.full_like(margin, sign) * factor / total
        gradients.append(derivative.masked_fill(margin <= 0, 0.0).to(logits.dtype))
    return torch.stack(losses + scores), gradients[0], gradients[1]


def _flat(gradients: Sequence[torch.Tensor | None], others: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """All gradients as one float64 vector, zero where there is none."""
    parts = [
        torch.zeros_like(o).flatten() if g is None else g.flatten()
        for g, o in zip(gradients, others, strict=True)
        if g is not None or o is not None
    ]
    return torch.cat([part.double() for part in parts])


def gradient_weights(
    terms: torch.Tensor,
    real_gradients: Sequence[torch.Tensor | None],
    fake_gradients: Sequence[torch.Tensor | None],
    *,
    scale: float = 1.0,
    device_scale: torch.Tensor | None = None,
    alpha1: float = 0.5,
    alpha2: float = 0.75,
    delta: float = 0.05,
    epsilon: float = 0.05,
    normalized: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights of two lists of gradients, each list taken as one vector.

    Args:
        terms: float64 [4], as `hinge_terms` returns it.
        real_gradients, fake_gradients: of the same parameters in the same order; None counts as zero.
        scale, device_scale: what the gradients are multiplied by; taken out of them before anything else.
        alpha1, alpha2, delta, epsilon, normalized: as in `adaptive_weights`.

    Returns:
        weights float64 [5]: w_r, w_f, |r|, |f|, cosine (norms with the 1e-4 under the root); finite bool []: whether
        all terms and gradients are finite. Where they are not both weights are NaN.
    """
    real, fake = _flat(real_gradients, fake_gradients), _flat(fake_gradients, real_gradients)
    factor = scale if device_scale is None else device_scale.double() * scale
    rr = real.dot(real) / factor**2 + SQUARED_NORM_FLOOR
    ff = fake.dot(fake) / factor**2 + SQUARED_NORM_FLOOR
    rf = real.dot(fake) / factor**2
    pair = adaptive_weights(
        rr, ff, rf, terms[2], terms[3],
        alpha1=alpha1, alpha2=alpha2, delta=delta, epsilon=epsilon, normalized=normalized,
    )  # fmt: skip
    finite = torch.cat([terms, torch.stack([rr, ff, rf])]).isfinite().all()
    nan = torch.full_like(rr, torch.nan)
    weight_real, weight_fake = (torch.where(finite, weight, nan) for weight in pair)
    norm_real, norm_fake = rr.sqrt(), ff.sqrt()
    weights = torch.stack([weight_real, weight_fake, norm_real, norm_fake, rf / (norm_real * norm_fake)])
    return weights, finite


def combine_(
    targets: Sequence[torch.Tensor],
    real_gradients: Sequence[torch.Tensor | None],
    fake_gradients: Sequence[torch.Tensor | None],
    weights: torch.Tensor,
    *,
    accumulate: Sequence[bool],
) -> None:
    """target ← w_r·g_r + w_f·g_f in place, added to the target where `accumulate` says so.

    Args:
        targets: floating-point tensors.
        real_gradients, fake_gradients: of the shapes of the targets; None counts as zero, not both of a pair.
        weights: float64 [≥ 2], w_r and w_f first.
        accumulate: one bool a target.
    """
    for target, real, fake, add in zip(targets, real_gradients, fake_gradients, accumulate, strict=True):
        real_part, fake_part = (
            weight * (torch.zeros_like(target) if gradient is None else gradient).double()
            for weight, gradient in ((weights[0], real), (weights[1], fake))
        )
        total = real_part + fake_part
        target.copy_(target.double() + total if add else total)
