"""How modules that a Python forward calls one by one run as one operator.

The owner, whose forward has been traced, arms its groups for the time of one call in this thread. An armed first
member computes the whole group; the others let exactly that result pass, and work as usual on anything else. Outside
such a call every module does what it always did. The hand-over is checked: a result that did not go through the whole
group is an error, never a wrong number.
"""

from __future__ import annotations

import contextlib
import threading
from typing import NamedTuple

import torch
from torch import nn, overrides

from fastcifar.fusing import patterns, reading
from fastcifar.fusing.dataflow import Group
from fastcifar.fusing.patterns import Match, Pattern
from fastcifar.fusing.sequences import is_container
from fastcifar.fusing.substitution import Substitute


class OwnerPlan(NamedTuple):
    """The groups that an owner's forward was proven to contain, when called with just these arguments."""

    groups: tuple[Group, ...]
    arguments: tuple[str, ...]
    impl: str


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


class _Call:
    """One group during one call of its owner."""

    def __init__(self, pattern: Pattern, match: Match, members: list[nn.Module], impl: str):
        self.pattern = pattern
        self.match = match
        self.members = members
        self.impl = impl
        self.position = 0
        self.pending = None

    def awaits_function(self) -> bool:
        return self.match.length > len(self.members)

    def start(self, x: torch.Tensor) -> torch.Tensor:
        with _without_function_mode():
            self.pending = self.pattern.run(self.match, self.members, x, self.impl)
        self.position = 1
        return self.pending

    def passes(self, member: nn.Module | None, y: object) -> bool:
        """Whether `y` is the group's result on its way through this member (None: the activation function)."""
        if self.pending is None or y is not self.pending:
            return False
        expected = self.members[self.position] if self.position < len(self.members) else None
        if expected is not member:
            return False
        self.position += 1
        if self.position == self.match.length:
            self.pending = None
        return True


class FusedMember(Substitute):
    """A module of a group: computes the group or lets its result pass while armed, itself otherwise."""

    _fused_state = "_fused_calls"
    _fused_calls: dict[int, tuple[_Call, ...]]

    def forward(self, *args, **kwargs):
        calls = () if kwargs or len(args) != 1 else self._fused_calls.get(_thread(), ())
        for call in calls:
            if call.passes(self, args[0]):
                return args[0]
        for call in calls:
            if call.members[0] is self and call.position == 0 and patterns.applies_to(args[0]):
                return call.start(args[0])
        return super().forward(*args, **kwargs)

    def arm(self, call: _Call) -> None:
        self._fused_calls[_thread()] = (*self._fused_calls.get(_thread(), ()), call)

    def disarm(self, call: _Call) -> None:
        remaining = tuple(c for c in self._fused_calls.get(_thread(), ()) if c is not call)
        if remaining:
            self._fused_calls[_thread()] = remaining
        else:
            self._fused_calls.pop(_thread(), None)


class _ActivationFunctions(overrides.TorchFunctionMode):
    """Lets a group's result pass through the activation function that the group contains."""

    def __init__(self, calls: list[_Call]):
        super().__init__()
        self.calls = calls

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for call in self.calls:
            if call.pending is not None and args and args[0] is call.pending:
                called = reading.functional_of(function, args[1:], kwargs)
                wanted = (call.match.activation, call.match.negative_slope)
                if called is not None and called[:2] == wanted and call.passes(None, args[0]):
                    return args[0]
        return function(*args, **kwargs)


def _without_function_mode():
    """An operator contains no activation function to find, but many tensor functions that the mode would slow down."""
    if torch.compiler.is_compiling() or not isinstance(overrides._get_current_function_mode(), _ActivationFunctions):
        return contextlib.nullcontext()
    return overrides._pop_mode_temporarily()


def _resolve(owner: nn.Module, path: str) -> nn.Module | None:
    """The member at `path`; None when what stands there, or on the way, is no longer what was traced."""
    module = owner
    *parents, last = path.split(".")
    for name in parents:
        module = module._modules.get(name)
        if module is None or not is_container(module) or reading.has_hooks(module):
            return None
    module = module._modules.get(last)
    return module if isinstance(module, FusedMember) else None


def _prepare(owner: nn.Module, group: Group, impl: str) -> _Call | None:
    members = [_resolve(owner, path) for path in group.members]
    if any(member is None for member in members):
        return None
    # Compiled code sees the activation function itself: a function mode would end the graph.
    functional = [] if group.functional is None or torch.compiler.is_compiling() else [group.functional]
    match = group.pattern.match([*members, *functional])
    return None if isinstance(match, str) else _Call(group.pattern, match, members[: match.length], impl)


class FusedOwner(Substitute):
    """A module whose forward was traced: runs it with its groups armed.

    A call with other arguments than those that were traced, optional ones among them, runs as it always did.
    """

    _fused_state = "_fused_plan"
    _fused_plan: OwnerPlan

    def forward(self, *args, **kwargs):
        groups, arguments, impl = self._fused_plan
        traced_form = len(args) + len(kwargs) == len(arguments) and all(name in arguments for name in kwargs)
        if torch.compiler.is_exporting() or not traced_form:
            return super().forward(*args, **kwargs)
        prepared = [_prepare(self, group, impl) for group in groups]
        calls = [call for call in prepared if call is not None]
        for call in calls:
            for member in call.members:
                member.arm(call)
        try:
            if any(call.awaits_function() for call in calls):
                with _ActivationFunctions(calls):
                    output = super().forward(*args, **kwargs)
            else:
                output = super().forward(*args, **kwargs)
        finally:
            for call in calls:
                for member in call.members:
                    member.disarm(call)
        for group, call in zip(groups, prepared, strict=True):
            if call is not None and call.pending is not None:
                raise RuntimeError(
                    f"{type(self).__name__}: the output of {group.members[0]!r} did not go through "
                    f"{', '.join(group.members[1:])} as it did in fuse(); call unfuse() before forward changes its ways"
                )
        return output
