"""One line that makes an existing model run fused operators: `fuse(model)`; `unfuse(model)` takes it back."""

from __future__ import annotations

import sys
import types

from torch import nn

from fastcifar import dispatch, validation
from fastcifar.fusing import patterns, reading
from fastcifar.fusing.plan import Plan
from fastcifar.fusing.report import Fused, Report, Skipped
from fastcifar.fusing.substitution import check_restorable, restore

__all__ = ["Fused", "Report", "Skipped", "fuse", "unfuse"]


def _check(function: str, model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be a torch.nn.Module, got {type(model).__name__}")


def fuse(model: nn.Module, *, batch_norm: bool = True, impl: str = "auto") -> Report:
    """Makes an existing model run its sequences of layers as one operator each.

    Depthwise Conv2d → BatchNorm2d → activation becomes `depthwise_conv_bn_act`; with `batch_norm`, every other
    BatchNorm2d becomes `batch_norm_act`, together with the addition of a residual and the activation that follow it.

    Works in place. The modules, their parameters, buffers, names, order, modes and state-dict keys stay what they are;
    outputs, gradients and buffers are those of the original up to rounding, their memory formats, too: what was
    contiguous is copied to be so (make the model and its input channels-last to save that). Only classes are exchanged,
    for subclasses with another `forward`, so optimisers made before, `train()`, `eval()`, `to()`, `copy.deepcopy`,
    checkpoints of the original, DistributedDataParallel and `torch.compile(fullgraph=True)` work. A second call starts
    from the original.

    Fused is what is proven to be in sequence: neighbours in an `nn.Sequential`, and what `torch.fx` can trace in the
    forward of the module that holds the first layer (additions and activations may be functions there). The batch
    normalisation may be `nn.BatchNorm2d` with any options, `nn.SyncBatchNorm` or timm's `BatchNormAct2d`; the
    activation ReLU, ReLU6, LeakyReLU, SiLU, Hardswish or none. What is fused runs as in the original whenever somebody
    would notice otherwise: a module with hooks or called on its own, a child that was exchanged, `torch.fx`,
    `torch.jit.trace`, `torch.export` and the transforms of `torch.func`. After changing what a forward does, call
    `fuse` again.

    Args:
        model: any module; wrappers such as DistributedDataParallel are looked into.
        batch_norm: fuse batch normalisations that follow other layers than depthwise convolutions, too.
        impl: see `fastcifar.functional.depthwise_conv_bn_act`.

    Returns:
        What was fused, and why the rest was not; `print` it.

    Raises:
        TypeError: `model` is not a module.
        ValueError: `impl` names no implementation of the operators, or the model is fused and the class of a fused
            module was changed since.
    """
    _check("fuse", model)
    validation.check_implementation("fuse", impl)
    chosen = patterns.PATTERNS if batch_norm else patterns.PATTERNS[:1]
    for pattern in chosen:
        names = [implementation.name for implementation in dispatch.implementations(pattern.operator)]
        if impl != "auto" and impl not in names:
            raise ValueError(f'fuse: {pattern.operator} has no implementation "{impl}" (it has: {", ".join(names)})')
    unfuse(model)
    plan, name = Plan(model, chosen), type(model).__name__
    plan.apply(impl)
    order = {path: position for position, (path, _) in enumerate(model.named_modules(remove_duplicate=False))}
    others = [m for m in model.modules() if isinstance(m, nn.Conv2d) and not reading.is_grouped_convolution(m)]
    return Report(
        model=name,
        impl=impl,
        fused=tuple(sorted(plan.fused, key=lambda entry: order[entry.path])),
        skipped=tuple(sorted(plan.skipped, key=lambda entry: order[entry.path])),
        other_convolutions=len(others),
    )


def unfuse(model: nn.Module) -> int:
    """Gives every module that `fuse` changed its own class back, in place; everything else is left as it is.

    Args:
        model: a model, or a part or copy of one, fused or not.

    Returns:
        How many modules were changed back.

    Raises:
        TypeError: `model` is not a module.
        ValueError: the class of a fused module was changed again after `fuse`; nothing is changed then.
    """
    _check("unfuse", model)
    modules = list(model.modules())
    for module in modules:
        check_restorable(module)
    return sum(restore(module) for module in modules)


class _Callable(types.ModuleType):
    """`fastcifar.fuse` is this module, in whatever order things are imported, and calling it calls the function."""

    def __call__(self, model: nn.Module, *, batch_norm: bool = True, impl: str = "auto") -> Report:
        return fuse(model, batch_norm=batch_norm, impl=impl)


sys.modules[__name__].__class__ = _Callable
