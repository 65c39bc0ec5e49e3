"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

_ONECYCLE_START = 1 / 25
_ONECYCLE_END = 1 / 250_000


def factor(name: str, step: int, steps: int, warmup_steps: int) -> float:
    """The learning rate of 0-based `step`, as a share of the highest one.

    All but onecycle rise linearly over `warmup_steps` and then stay ("constant") or fall to zero just after the last
    step ("linear", "cosine"). "onecycle" goes from 1/25 up and down to 4e-6, on two half cosines.

    Args:
        name: "constant", "cosine", "linear" or "onecycle".
        step: from 0 to `steps` − 1.
        steps, warmup_steps: length of the run and of the rise, in steps.

    Source: Loshchilov and Hutter, SGDR, 2017 (cosine); Smith and Topin, Super-Convergence, 2018 (one cycle), in the
    form of `torch.optim.lr_scheduler.OneCycleLR`.
    """
    if name == "onecycle":
        peak = max(warmup_steps - 1, 0)
        if step <= peak and peak > 0:
            return _half_cosine(_ONECYCLE_START, 1.0, step / peak)
        return _half_cosine(1.0, _ONECYCLE_END, (step - peak) / max(steps - 1 - peak, 1))
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if name == "constant":
        return 1.0
    remaining = (steps - step) / max(steps - warmup_steps, 1)
    return remaining if name == "linear" else 0.5 * (1.0 - math.cos(math.pi * remaining))


def _half_cosine(start: float, end: float, progress: float) -> float:
    return end + 0.5 * (start - end) * (1.0 + math.cos(math.pi * progress))
