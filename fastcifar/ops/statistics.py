"""Batch statistics across processes, and what they do to the running ones."""

from __future__ import annotations

import torch
import torch.distributed as dist


def merge_over_ranks(
    statistics: torch.Tensor, count: int, process_group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Mean and biased variance [2, C] over all ranks, whose counts may differ, and the count of all ([], fp32).

    Without a group: the statistics themselves and None.

    Source: Chan, Golub and LeVeque, Updating formulae and a pairwise algorithm for computing sample variances, 1979.
    """
    if process_group is None:
        return statistics, None
    own = torch.cat([statistics.flatten(), statistics.new_tensor([float(count)])])
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(process_group))]
    dist.all_gather(parts, own, group=process_group)
    table = torch.stack(parts)  # [ranks, 2·C + 1]
    counts = table[:, -1:]
    means, variances = table[:, :-1].unflatten(1, (2, -1)).unbind(1)
    total = counts.sum()
    share = counts / total.clamp(min=1)
    mean = (share * means).sum(0)
    variance = (share * (variances + (means - mean).square())).sum(0)
    return torch.stack([mean, variance]), total


def mean_terms(
    sums: torch.Tensor, values: int, count: torch.Tensor | None, process_group: dist.ProcessGroup | None
) -> torch.Tensor:
    """The two sums [2, C] of a batch norm's gradient, over all ranks of the group, divided by the number of values."""
    if process_group is not None:
        sums = sums.clone()
        dist.all_reduce(sums, group=process_group)
    return sums / (max(values, 1) if count is None else count)


def check_total(total: torch.Tensor | None, own: int, size: tuple[int, ...]) -> None:
    """Refuses a single value per channel over all ranks, in torch's words.

    The device is asked only where this rank's own count leaves it open.

    Raises:
        ValueError: statistics of one value.
    """
    if total is not None and own < 2 and float(total) == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {list(size)}")


@torch.no_grad()
def update_running(
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    statistics: torch.Tensor,
    count: int | torch.Tensor,
    momentum: float,
) -> None:
    """Moves the running statistics towards these, in place, as `F.batch_norm` does: the variance unbiased."""
    if running_mean is None or running_var is None:
        return
    mean, variance = statistics.to(running_mean.dtype).unbind(0)
    running_mean.lerp_(mean, momentum)
    running_var.lerp_(variance * (count / (count - 1)), momentum)
