"""What a module of an existing model is, told by what its forward runs, and whether an operator may stand in for it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from fastcifar.nn.batch_norm import BatchNormAct


class Functional(NamedTuple):
    """An activation called as a function, with the `leaky_relu` slope; `label` is how the code called it."""

    activation: str
    negative_slope: float
    label: str


class Addition(NamedTuple):
    """A sum of two tensors, one of them the chain's; `label` is how the code called it."""

    label: str


_FUNCTIONS = {
    F.relu: "relu",
    F.relu_: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    torch.Tensor.relu: "relu",
    torch.Tensor.relu_: "relu",
    F.relu6: "relu6",
    F.silu: "silu",
    F.hardswish: "hardswish",
    F.leaky_relu: "leaky_relu",
    F.leaky_relu_: "leaky_relu",
}
IN_PLACE_ADDITIONS = (operator.iadd, torch.Tensor.add_)
_ADDITIONS = (operator.add, torch.add, torch.Tensor.add, *IN_PLACE_ADDITIONS)
_BATCH_NORMS = (nn.BatchNorm2d, nn.LazyBatchNorm2d, nn.SyncBatchNorm)
_NO_SHAPE = "{} has no shape yet; run the model once, then fuse it"
_TIMM_NORM_ACT = ("timm.layers.norm_act", "BatchNormAct2d.forward")


def describe(module: object) -> str:
    """A module's class, or a function's name, for messages."""
    if isinstance(module, (Functional, Addition)):
        return module.label
    return getattr(module, "original_name", type(module).__name__)


def forward_of(module: nn.Module) -> Callable | None:
    """The forward function that calling this module runs; None when the instance brings its own."""
    if "forward" in module.__dict__:
        return None
    return getattr(type(module), "_fused_forward", type(module).forward)


def is_sequence(module: nn.Module) -> bool:
    """Calling it runs its children one after the other, as `nn.Sequential` does."""
    return isinstance(module, nn.Sequential) and forward_of(module) is nn.Sequential.forward


def has_hooks(module: nn.Module) -> bool:
    """Somebody looks at what goes into or comes out of this module, forward or backward."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _taken_over_obstacle(module: nn.Module) -> str | None:
    if has_hooks(module):
        return f"hooks on the {describe(module)}"
    if "parametrizations" in module._modules:
        return f"the {describe(module)} is parametrised"
    if type(module).__call__ is not nn.Module.__call__:
        return f"{describe(module)} has its own __call__"
    return None


def is_grouped_convolution(module: nn.Module) -> bool:
    """A convolution of any kind with more than one group."""
    kinds = type(module).__module__.startswith(("torch.ao.", "torch.jit."))
    if not (kinds or isinstance(module, nn.modules.conv._ConvNd)):
        return False
    groups = getattr(module, "groups", None)
    return isinstance(groups, int) and groups > 1 and hasattr(module, "in_channels")


def padding_of(conv: nn.Conv2d) -> tuple[int, int] | None:
    """A convolution's padding in pixels; None where both sides of an axis need different ones."""
    if conv.padding == "valid":
        return (0, 0)
    if conv.padding == "same":
        total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        return None if any(t % 2 for t in total) else (total[0] // 2, total[1] // 2)
    return conv.padding


def depthwise_obstacle(conv: nn.Module) -> str | None:
    """Why the fused operator cannot stand in for this grouped convolution; None when it can."""
    if isinstance(conv, LazyModuleMixin):
        return _NO_SHAPE.format(describe(conv))
    if forward_of(conv) is not nn.Conv2d.forward or type(conv)._conv_forward is not nn.Conv2d._conv_forward:
        return f"{describe(conv)} has a forward other than that of nn.Conv2d"
    obstacle = _taken_over_obstacle(conv)
    if obstacle is not None:
        return obstacle
    if conv.groups != conv.in_channels:
        return f"not depthwise: {conv.groups} groups of {conv.in_channels // conv.groups} channels"
    if conv.out_channels != conv.in_channels:
        return f"channel multiplier {conv.out_channels // conv.in_channels}, only 1 can be fused"
    if conv.bias is not None:
        return "the convolution has a bias"
    if conv.padding_mode != "zeros":
        return f"padding_mode is {conv.padding_mode!r}, only 'zeros' can be fused"
    if padding_of(conv) is None:
        return "padding='same' is one pixel wider on one side"
    return None


def _is_timm_norm_act(norm: nn.Module) -> bool:
    forward = forward_of(norm)
    return (getattr(forward, "__module__", ""), getattr(forward, "__qualname__", "")) == _TIMM_NORM_ACT


def is_batch_norm(module: object) -> bool:
    """A two-dimensional batch normalisation of any kind, those of this package excepted: they are fused already."""
    return isinstance(module, _BATCH_NORMS) and not isinstance(module, BatchNormAct)


def batch_norm_obstacle(norm: nn.Module) -> str | None:
    """Why no operator can stand in for this batch normalisation; None when one can."""
    if isinstance(norm, LazyModuleMixin):
        return _NO_SHAPE.format(describe(norm))
    if forward_of(norm) not in (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward) and not _is_timm_norm_act(norm):
        return f"{describe(norm)} has its own forward"
    obstacle = _taken_over_obstacle(norm)
    if obstacle is not None:
        return obstacle
    if (norm.running_mean is None) != (norm.running_var is None):
        return f"{describe(norm)} has only one of running_mean and running_var"
    if norm.momentum is not None and not 0.0 <= norm.momentum <= 1.0:
        return f"{describe(norm)} has momentum {norm.momentum}, which is not in [0, 1]"
    if not norm.eps > 0.0:
        return f"{describe(norm)} has eps {norm.eps}, which is not positive"
    return None


def activation_of(module: object) -> tuple[str, float] | None:
    """An activation's name and `leaky_relu` slope; None for what is no activation of the fused operators."""
    if isinstance(module, Functional):
        return module.activation, module.negative_slope
    if not isinstance(module, nn.Module) or _taken_over_obstacle(module) is not None:
        return None
    forward = forward_of(module)
    for kind, name in ((nn.ReLU, "relu"), (nn.SiLU, "silu"), (nn.Hardswish, "hardswish")):
        if forward is kind.forward:
            return name, 0.01
    if forward is nn.Hardtanh.forward and (module.min_val, module.max_val) == (0, 6):
        return "relu6", 0.01
    if forward is nn.LeakyReLU.forward:
        return "leaky_relu", module.negative_slope
    return None


def built_in_activation(norm: nn.Module) -> tuple[str, float] | str | None:
    """The activation that a batch normalisation of timm applies itself, or why it cannot be fused; None without one."""
    if not _is_timm_norm_act(norm):
        return None
    if forward_of(norm.drop) is not nn.Identity.forward or has_hooks(norm.drop):
        return f"{describe(norm)} applies {describe(norm.drop)} before its activation"
    if forward_of(norm.act) is nn.Identity.forward and not has_hooks(norm.act):
        return "none", 0.01
    return activation_of(norm.act) or f"{describe(norm)} applies {describe(norm.act)}"


def function_of(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Functional | Addition | None:
    """What `function(*args, **kwargs)` applies to its first argument, an addition also to its second; None when it is
    nothing that can be fused."""
    label = getattr(function, "__name__", str(function))
    if function in _ADDITIONS and len(args) == 2 and not kwargs:
        return Addition(label)
    activation = _FUNCTIONS.get(function)
    if activation is None:
        return None
    slope = 0.01
    if activation == "leaky_relu":
        slope = args[1] if len(args) > 1 else kwargs.get("negative_slope", slope)
    if not isinstance(slope, (int, float)):
        return None
    return Functional(activation, float(slope), label)


def synchronised_group(norm: nn.Module) -> dist.ProcessGroup | None:
    """The ranks over which a batch normalisation takes its statistics in its next call; None for this process alone."""
    if forward_of(norm) is not nn.SyncBatchNorm.forward or not norm.training:
        return None
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = norm.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None
