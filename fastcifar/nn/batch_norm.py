"""What every module with batch normalisation needs: the momentum of this step, and the fused norm itself."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from fastcifar import functional, validation


def advance_momentum(module: nn.Module) -> float:
    """Counts a training batch in `module.num_batches_tracked` and returns the weight of its statistics.

    Raises:
        RuntimeError: `momentum=None` while a CUDA graph is captured (the count would be read on the host).
    """
    if not module.training or module.num_batches_tracked is None:
        return module.momentum or 0.0
    module.num_batches_tracked.add_(1)
    if module.momentum is not None:
        return module.momentum
    if module.num_batches_tracked.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{type(module).__name__}: momentum=None (cumulative average) reads the batch count on the host and "
            "cannot be captured in a CUDA graph; set momentum to a number"
        )
    return 1.0 / float(module.num_batches_tracked)


class BatchNormState(NamedTuple):
    """What `F.batch_norm` would get from a module in its next call."""

    running_mean: torch.Tensor | None
    running_var: torch.Tensor | None
    training: bool
    momentum: float


def advance_batch_norm(norm: nn.Module) -> BatchNormState:
    """Counts the batch as the forward of `nn.BatchNorm2d` would, and returns what it would normalise with."""
    momentum = advance_momentum(norm) if norm.track_running_stats else norm.momentum or 0.0
    buffers = not norm.training or norm.track_running_stats
    return BatchNormState(
        norm.running_mean if buffers else None,
        norm.running_var if buffers else None,
        norm.training or norm.running_mean is None,
        momentum,
    )


class BatchNormAct(nn.BatchNorm2d):
    """`nn.BatchNorm2d`, the addition of a residual and an activation, run as one operator.

    Input [N, num_features, *], output of the same shape and dtype; parameters and buffers are those of
    `nn.BatchNorm2d`, under the same names. `process_group` synchronises it; `nn.SyncBatchNorm.convert_sync_batchnorm`
    does not fit: it would put an `nn.SyncBatchNorm`, which has no activation, in its place.

    Args:
        num_features: number of channels.
        activation: "none", "relu", "relu6", "leaky_relu", "silu" or "hardswish".
        eps, momentum, affine, track_running_stats: as in `nn.BatchNorm2d`.
        negative_slope: the slope of leaky_relu.
        process_group: take batch statistics over all ranks of this group; None for this process alone.
        impl: see `fastcifar.functional.batch_norm_act`.

    Raises:
        ValueError: an option that is out of range; the message names it.
    """

    def __init__(
        self,
        num_features: int,
        activation: str = "relu",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        impl: str = "auto",
        *,
        negative_slope: float = 0.01,
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self.activation = validation.choose("activation", activation, validation.ACTIVATIONS)
        validation.check_implementation(type(self).__name__, impl)
        self.negative_slope = negative_slope
        self.process_group = process_group
        self.impl = impl

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """act(batch_norm(x) + residual), [N, num_features, *]."""
        state = advance_batch_norm(self)
        return functional.batch_norm_act(
            x,
            self.weight,
            self.bias,
            state.running_mean,
            state.running_var,
            residual,
            activation=self.activation,
            negative_slope=self.negative_slope,
            training=state.training,
            momentum=state.momentum,
            eps=self.eps,
            process_group=self.process_group if self.training else None,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        """The options, as `print(model)` shows them."""
        return f"{super().extra_repr()}, activation={self.activation}, impl={self.impl}"
