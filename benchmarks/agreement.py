"""No time without agreement: what is compared must first be as near to float64 as eager PyTorch is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

Results = Sequence[torch.Tensor]


def as_near(got: Results, eager: Results, exact: Results, *, eps: float) -> bool:
    """Whether every result is as near to the exact one as eager's in that dtype, within a factor of three and a few
    roundings of the largest value."""
    got, eager = ([tensor.detach().double() for tensor in results] for results in (got, eager))
    return all(
        bool((g - e).abs().max() <= 3 * (w - e).abs().max() + 4 * eps * e.abs().max())
        for g, w, e in zip(got, eager, exact, strict=True)
    )


def refused(
    calls: Mapping[str, Callable[[], Results]], exact: Results, *, eager: str, ours: str | None, eps: float
) -> dict[str, str]:
    """Which of these must not be timed, and why: results that are not as near as eager's, or an error.

    Args:
        calls: by name, what gives the results.
        exact: the same results in float64.
        eager: the name that sets the error budget.
        ours: the name that must not fail.
        eps: of the dtype that is computed in.

    Raises:
        ArithmeticError: ours does not agree.
    """
    low, reasons = calls[eager](), {}
    for name, call in calls.items():
        if name == eager:
            continue
        try:
            if not as_near(call(), low, exact, eps=eps):
                reasons[name] = "does not agree with float64"
        except Exception as error:
            # Another library's failure (a compiler's, say) is a row of the table; ours is ours to mend.
            if name == ours:
                raise
            reasons[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:80]}"
    if ours in reasons:
        raise ArithmeticError(f"{ours} {reasons[ours]}; nothing is timed")
    return reasons
