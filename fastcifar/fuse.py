"""One line that makes an existing model run fused operators: `fuse(model)`; `unfuse(model)` takes it back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import fx, nn

from fastcifar import dispatch, validation
from fastcifar.fusing import dataflow, patterns, reading, sequences
from fastcifar.fusing.armed import FusedMember, FusedOwner, OwnerPlan
from fastcifar.fusing.report import Fused, Report, Skipped
from fastcifar.fusing.sequences import FusedSequence
from fastcifar.fusing.substitution import check_restorable, restore, substitute

__all__ = ["Fused", "Report", "Skipped", "fuse", "unfuse"]

_OPAQUE = (
    (torch.jit.ScriptModule, "inside a torch.jit.ScriptModule; fuse the model before it is scripted"),
    (fx.GraphModule, "inside a torch.fx.GraphModule; fuse the model before it is traced"),
)


def _join(prefix: str, name: str) -> str:
    return ".".join(part for part in (prefix, name) if part)


def _opaque(module: nn.Module) -> str | None:
    return next((reason for kind, reason in _OPAQUE if isinstance(module, kind)), None)


def _owners(module: nn.Module, path: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, nn.Module]]:
    """The modules whose forward decides what runs after what: the model, and all that are no mere containers."""
    seen = set() if seen is None else seen
    if id(module) in seen:
        return
    seen.add(id(module))
    if not path or not sequences.is_container(module):
        yield path, module
    if _opaque(module) is None:
        for name, child in module._modules.items():
            if child is not None:
                yield from _owners(child, _join(path, name), seen)


def _holders(owner: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The owner and the containers below it, whose children nobody but its forward (or a sequence) calls."""
    yield path, owner
    for name, child in owner._modules.items():
        if child is not None and sequences.is_container(child) and _opaque(child) is None:
            yield from _holders(child, _join(path, name))


class _Plan:
    """All that is to be done to a model, found without touching it."""

    def __init__(self, model: nn.Module):
        self.sequences: list[tuple[nn.Sequential, list[str]]] = []
        self.owners: list[tuple[nn.Module, list[dataflow.Group]]] = []
        self.fused: list[Fused] = []
        self.skipped: list[Skipped] = []
        self.noted: set[int] = set()
        for path, owner in _owners(model):
            reason = _opaque(owner)
            if reason is None:
                self._visit(path, owner)
            else:
                self._skip_below(path, owner, reason)

    def _skip_below(self, path: str, module: nn.Module, reason: str) -> None:
        for name, child in module.named_modules(prefix=path):
            if patterns.beginning_at(child) is not None:
                self.skipped.append(Skipped(name, reason))

    def _visit(self, path: str, owner: nn.Module) -> None:
        undecided = []
        for below, holder in _holders(owner):
            if reading.is_sequence(holder):
                undecided += self._visit_sequence(path, below, holder)
                continue
            for name, child in holder._modules.items():
                pattern = None if child is None else patterns.beginning_at(child)
                if pattern is None:
                    continue
                alone = pattern.match([child, sequences.LAST])
                if isinstance(alone, str) and alone != sequences.LAST:
                    self.skipped.append(Skipped(_join(path, _join(below, name)), alone))
                else:
                    undecided.append(_join(below, name))
        if undecided:
            self._visit_forward(path, owner, undecided)

    def _visit_sequence(self, path: str, below: str, sequence: nn.Sequential) -> list[str]:
        """Notes what the order of the children decides; returns the paths of those that stand last."""
        where, begun, undecided = _join(path, below), [], []
        noted = id(sequence) in self.noted
        self.noted.add(id(sequence))
        for name, pattern, members, match in sequences.find(sequence):
            if match == sequences.LAST:
                undecided.append(_join(below, name))
            elif noted:
                continue
            elif isinstance(match, str):
                self.skipped.append(Skipped(_join(where, name), match))
            else:
                begun.append(name)
                self._note(pattern.operator, where, members, match.activation)
        if begun:
            self.sequences.append((sequence, begun))
        return undecided

    def _visit_forward(self, path: str, owner: nn.Module, undecided: list[str]) -> None:
        groups, taken = [], set()
        for below, (group, note) in dataflow.find(owner, undecided).items():
            if below in taken:
                continue
            if group is None:
                self.skipped.append(Skipped(_join(path, below), note))
                continue
            groups.append(group)
            taken.update(group.members)
            self._note(group.pattern.operator, path, group.members, note)
        if groups:
            self.owners.append((owner, groups))

    def _note(self, operator: str, path: str, members: Iterable[str], activation: str) -> None:
        paths = tuple(_join(path, member) for member in members)
        self.fused.append(Fused(paths[0], operator, paths, activation))

    def apply(self, impl: str) -> None:
        for sequence, begun in self.sequences:
            substitute(sequence, FusedSequence, dict.fromkeys(begun, impl))
        for owner, groups in self.owners:
            for group in groups:
                for member in group.members:
                    substitute(owner.get_submodule(member), FusedMember, {})
            arguments = dataflow.required_arguments(owner)
            substitute(owner, FusedOwner, OwnerPlan(tuple(groups), arguments, impl))


def _check(function: str, model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be a torch.nn.Module, got {type(model).__name__}")


def fuse(model: nn.Module, *, impl: str = "auto") -> Report:
    """Makes an existing model run its depthwise Conv2d → BatchNorm2d → activation sequences as one operator each.

    Works in place. The modules, their parameters, buffers, names, order, modes and state-dict keys stay what they are;
    outputs, gradients and buffers are those of the original up to rounding. Only classes are exchanged, for subclasses
    with another `forward`, so optimisers made before, `train()`, `eval()`, `to()`, `copy.deepcopy`, checkpoints of the
    original, DistributedDataParallel and `torch.compile(fullgraph=True)` work. A second call starts from the original.

    Fused is what is proven to be in sequence: neighbours in an `nn.Sequential`, and what `torch.fx` can trace in the
    forward of the module that holds the convolution (the activation may be a function there; compiled code runs that
    function after the fused convolution and normalisation). The batch normalisation may be `nn.BatchNorm2d` with any
    options, `nn.SyncBatchNorm` or timm's `BatchNormAct2d`; the activation ReLU, ReLU6, LeakyReLU, SiLU, Hardswish or
    none. What is fused runs as in the original whenever somebody would notice otherwise: a module with hooks or called
    on its own, a child that was exchanged, `torch.fx`, `torch.jit.trace` and `torch.export`.
    After changing what a forward does, call `fuse` again.

    Args:
        model: any module; wrappers such as DistributedDataParallel are looked into.
        impl: see `fastcifar.functional.depthwise_conv_bn_act`.

    Returns:
        What was fused, and why the rest was not; `print` it.

    Raises:
        TypeError: `model` is not a module.
        ValueError: `impl` names no implementation of the operators.
    """
    _check("fuse", model)
    validation.check_implementation("fuse", impl)
    for pattern in patterns.PATTERNS:
        names = [implementation.name for implementation in dispatch.implementations(pattern.operator)]
        if impl != "auto" and impl not in names:
            raise ValueError(f'fuse: {pattern.operator} has no implementation "{impl}" (it has: {", ".join(names)})')
    unfuse(model)
    plan, name = _Plan(model), type(model).__name__
    plan.apply(impl)
    order = {path: position for position, (path, _) in enumerate(model.named_modules(remove_duplicate=False))}
    others = [
        m for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd) and patterns.beginning_at(m) is None
    ]
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
