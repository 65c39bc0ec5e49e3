"""Plain-PyTorch implementations: the definition that every kernel is held to.

Each function here has the signature of its counterpart in `fastcifar.functional` (without `impl`), runs on every
device and in every floating-point dtype including float64, and is differentiable by autograd, twice.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F


def activate(y: torch.Tensor, activation: str, negative_slope: float = 0.01, *, inplace: bool = False) -> torch.Tensor:
    """Applies the activation of that name to a tensor of any shape; `negative_slope` serves leaky_relu only."""
    if activation == "none":
        return y
    if activation == "leaky_relu":
        return F.leaky_relu(y, negative_slope, inplace)
    return {"relu": F.relu, "relu6": F.relu6, "silu": F.silu, "hardswish": F.hardswish}[activation](y, inplace)


def _activate_fresh(y: torch.Tensor, activation: str, negative_slope: float) -> torch.Tensor:
    """`activate` for a tensor that nobody else holds and whose maker's backward does not read: in place, unless the
    activation's own backward would need a copy."""
    return activate(y, activation, negative_slope, inplace=activation in ("relu", "relu6") or not y.requires_grad)


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, process_group):
        ctx.process_group = process_group
        total = tensor.clone()
        dist.all_reduce(total, group=process_group)
        return total

    @staticmethod
    def backward(ctx, gradient):
        return _SumOverRanks.apply(gradient.contiguous(), ctx.process_group), None


class _GatherOverRanks(torch.autograd.Function):
    """[K] of each rank → [ranks, K] on all."""

    @staticmethod
    def forward(ctx, tensor, process_group):
        ctx.process_group = process_group
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(process_group))]
        dist.all_gather(parts, tensor, group=process_group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx, gradient):
        total = _SumOverRanks.apply(gradient.contiguous(), ctx.process_group)
        return total[dist.get_rank(ctx.process_group)], None


def _synchronised_batch_norm(y, weight, bias, running_mean, running_var, momentum, eps, process_group):
    """Batch norm over the batches of all ranks, which may differ in size: one all-gather of (count, mean, M2) forward,
    one all-reduce backward."""
    dtype = torch.promote_types(y.dtype, torch.float32)
    values = y.to(dtype)
    axes = [0, *range(2, y.dim())]
    shape = [1, -1] + [1] * (y.dim() - 2)
    count = y.numel() // y.shape[1]
    own_mean = values.sum(axes) / max(count, 1)
    own_squares = (values - own_mean.view(shape)).square().sum(axes)
    own = torch.cat([values.new_tensor([float(count)]), own_mean, own_squares])
    table = _GatherOverRanks.apply(own, process_group)  # [ranks, 1 + 2·C]
    counts, (means, squares) = table[:, :1].detach(), table[:, 1:].unflatten(1, (2, -1)).unbind(1)
    total = counts.sum()
    if count < 2 and float(total) == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {list(y.shape)}")
    mean = (counts * means).sum(0) / total
    variance = (squares + counts * (means - mean).square()).sum(0) / total
    centred = values - mean.view(shape)
    if running_mean is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((variance * (total / (total - 1))).to(running_var.dtype), momentum)
    normalised = centred * torch.rsqrt(variance + eps).view(shape)
    if weight is not None:
        normalised = normalised * weight.to(dtype).view(shape)
    if bias is not None:
        normalised = normalised + bias.to(dtype).view(shape)
    return normalised.to(y.dtype)


def batch_norm(
    y: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    *,
    training: bool,
    momentum: float,
    eps: float,
    process_group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """`F.batch_norm`; with a process group and `training`, over the batches of all its ranks."""
    if training and process_group is not None:
        return _synchronised_batch_norm(y, weight, bias, running_mean, running_var, momentum, eps, process_group)
    return F.batch_norm(y, running_mean, running_var, weight, bias, training, momentum, eps)


def depthwise_conv_bn_act(
    x: torch.Tensor,
    weight: torch.Tensor,
    bn_weight: torch.Tensor | None,
    bn_bias: torch.Tensor | None,
    running_mean: torch.Tensor | None = None,
    running_var: torch.Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    activation: str = "relu",
    negative_slope: float = 0.01,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    process_group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """act(batch_norm(conv2d(x, weight, groups=C))); shapes as in `fastcifar.functional.depthwise_conv_bn_act`."""
    y = F.conv2d(x, weight, None, stride, padding, dilation, x.shape[1])
    y = batch_norm(
        y,
        bn_weight,
        bn_bias,
        running_mean,
        running_var,
        training=training,
        momentum=momentum,
        eps=eps,
        process_group=process_group,
    )
    return _activate_fresh(y, activation, negative_slope)


def batch_norm_act(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor | None = None,
    running_var: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    activation: str = "relu",
    negative_slope: float = 0.01,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    process_group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """act(batch_norm(x) + residual); shapes as in `fastcifar.functional.batch_norm_act`."""
    y = batch_norm(
        x,
        weight,
        bias,
        running_mean,
        running_var,
        training=training,
        momentum=momentum,
        eps=eps,
        process_group=process_group,
    )
    return _activate_fresh(y if residual is None else y.add_(residual), activation, negative_slope)
