"""What is to be done to a model, found without touching it, and then done."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import fx, nn

from fastcifar.fusing import dataflow, patterns, reading, sequences
from fastcifar.fusing.armed import FusedMember, FusedOwner, OwnerPlan
from fastcifar.fusing.dataflow import Group
from fastcifar.fusing.patterns import Pattern
from fastcifar.fusing.report import Fused, Skipped
from fastcifar.fusing.sequences import FusedSequence
from fastcifar.fusing.substitution import substitute

_OPAQUE = (
    (torch.jit.ScriptModule, "inside a torch.jit.ScriptModule; fuse the model before it is scripted"),
    (fx.GraphModule, "inside a torch.fx.GraphModule; fuse the model before it is traced"),
)


class Step(NamedTuple):
    """A group, the module that calls its members (an `nn.Sequential`, or the owner of a forward), and its entry."""

    caller: nn.Module
    group: Group
    entry: Fused


def _join(prefix: str, name: str) -> str:
    return ".".join(part for part in (prefix, name) if part)


def _opaque(module: nn.Module) -> str | None:
    return next((reason for kind, reason in _OPAQUE if isinstance(module, kind)), None)


def _owners(module: nn.Module, path: str, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    """The modules whose forward decides what runs after what: the model, and all that are no mere containers."""
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


def _step(caller: nn.Module, path: str, group: Group, activation: str) -> Step:
    members = tuple(_join(path, e) if isinstance(e, str) else f"{e.label}()" for e in group.chain)
    return Step(caller, group, Fused(members[0], group.pattern.operator, members, activation))


class Plan:
    """The groups of a model for the chosen patterns, and the reasons why other modules begin none."""

    def __init__(self, model: nn.Module, chosen: Sequence[Pattern]):
        self.chosen = chosen
        self.in_sequences: list[Step] = []
        self.in_forwards: list[Step] = []
        self.skipped: list[Skipped] = []
        self._noted: set[int] = set()
        for path, owner in _owners(model, "", set()):
            reason = _opaque(owner)
            if reason is None:
                self._visit(path, owner)
            else:
                self._skip_below(path, owner, reason)
        # A sequence may begin with what ends a group of the forward that calls it.
        ends = {id(s.caller.get_submodule(path)) for s in self.in_forwards for path in s.group.modules[1:]}
        self.in_sequences = [s for s in self.in_sequences if id(s.caller._modules[s.group.chain[0]]) not in ends]

    @property
    def fused(self) -> list[Fused]:
        """An entry of the report for each group."""
        return [step.entry for step in (*self.in_sequences, *self.in_forwards)]

    def apply(self, impl: str) -> None:
        """Exchanges the classes of all modules that take part; what a class prevents is skipped as a whole."""
        for step in list(self.in_sequences):
            obstacle = substitute([(step.caller, FusedSequence, {})])
            if obstacle is None:
                step.caller._fused_implementations[step.group.chain[0]] = impl
            else:
                self._drop(self.in_sequences, step, obstacle)
        for owner, group in itertools.groupby(list(self.in_forwards), key=lambda step: step.caller):
            steps = list(group)
            paths = (path for step in steps for path in step.group.modules)
            members = [(owner.get_submodule(path), FusedMember, {}) for path in paths]
            plan = OwnerPlan(tuple(step.group for step in steps), dataflow.required_arguments(owner), impl)
            obstacle = substitute([*members, (owner, FusedOwner, plan)])
            for step in steps if obstacle else ():
                self._drop(self.in_forwards, step, obstacle)

    def _drop(self, steps: list[Step], step: Step, reason: str) -> None:
        steps.remove(step)
        self._skip(step.entry.path, reason)

    def _skip(self, path: str, reason: str) -> None:
        self.skipped.append(Skipped(path, reason))

    def _skip_below(self, path: str, module: nn.Module, reason: str) -> None:
        for name, child in module.named_modules(prefix=path):
            if patterns.beginning_at(child, self.chosen) is not None:
                self._skip(name, reason)

    def _visit(self, path: str, owner: nn.Module) -> None:
        # Each module whose group the forward decides, with the step to take when it decides nothing.
        undecided: dict[str, tuple[Pattern, Step | None]] = {}
        for below, holder in _holders(owner):
            if reading.is_sequence(holder):
                self._visit_sequence(path, below, holder, undecided)
                continue
            for name, child in holder._modules.items():
                pattern = None if child is None else patterns.beginning_at(child, self.chosen)
                if pattern is None:
                    continue
                alone = pattern.match([child, sequences.LAST])
                if isinstance(alone, str) and alone != sequences.LAST:
                    self._skip(_join(path, _join(below, name)), alone)
                else:
                    undecided[_join(below, name)] = pattern, None
        if undecided:
            self._visit_forward(path, owner, undecided)

    def _visit_sequence(self, path: str, below: str, sequence: nn.Sequential, undecided: dict) -> None:
        where, noted = _join(path, below), id(sequence) in self._noted
        self._noted.add(id(sequence))
        for pattern, names, match, is_open in sequences.find(sequence, self.chosen):
            step = None
            if not isinstance(match, str):
                step = _step(sequence, where, Group(pattern, names), match.activation)
            if is_open:
                undecided[_join(below, names[0])] = pattern, None if noted else step
            elif noted:
                continue
            elif step is None:
                self._skip(_join(where, names[0]), match)
            else:
                self.in_sequences.append(step)

    def _visit_forward(self, path: str, owner: nn.Module, undecided: dict[str, tuple[Pattern, Step | None]]) -> None:
        found = dataflow.find(owner, [(name, pattern) for name, (pattern, _) in undecided.items()])
        for below, (group, note) in found.items():
            fallback = undecided[below][1]
            decided = None if group is None else _step(owner, path, group, note)
            if fallback is not None and (decided is None or decided.entry.members == fallback.entry.members):
                self.in_sequences.append(fallback)
            elif decided is not None:
                self.in_forwards.append(decided)
            else:
                self._skip(_join(path, below), note)
