"""How modules that a Python forward calls one by one run as one operator.

The owner, whose forward has been traced, arms its groups for the time of one call in this thread. An armed first
member computes the whole group; what follows lets exactly that result pass, and works as usual on anything else. A
group that adds a residual computes at the addition, because the residual may not exist before: until then its first
member hands on a stand-in. Outside such a call every module does what it always did. The hand-over is checked: a
result that did not go through the whole group is an error, never a wrong number.
"""

from __future__ import annotations

import threading
import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from fastcifar.fusing import patterns, reading
from fastcifar.fusing.dataflow import Group
from fastcifar.fusing.patterns import Match
from fastcifar.fusing.reading import Addition, Functional
from fastcifar.fusing.sequences import is_container
from fastcifar.fusing.substitution import Substitute


class OwnerPlan(NamedTuple):
    """The groups that an owner's forward was proven to contain, when called with just these arguments."""

    groups: tuple[Group, ...]
    arguments: tuple[str, ...]
    impl: str


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def _version(x: torch.Tensor) -> int | None:
    """How often x was changed in place; None where nobody counts."""
    return None if torch.compiler.is_compiling() or x.is_inference() else x._version


class _Call:
    """One group during one call of its owner: `pending` is what was handed on and has not yet passed the whole chain,
    or None."""

    def __init__(self, group: Group, match: Match, chain: Sequence[Any], impl: str):
        self.group = group
        self.match = match
        self.chain = chain
        self.modules = [element for element in chain if isinstance(element, nn.Module)]
        self.impl = impl
        self.position = 0
        self.input = None
        self.version = None
        self.pending = None

    def run(self, residual: torch.Tensor | None = None) -> torch.Tensor:
        x, self.input = self.input, None
        if _version(x) != self.version:
            raise RuntimeError(
                f"the input of {self.group.modules[0]!r} was changed in place before the addition at which fuse() "
                "normalises it; call fuse() again after exchanging modules"
            )
        return patterns.run(self.group.pattern, self.match, self.modules, x, residual, self.impl)

    def start(self, x: torch.Tensor) -> torch.Tensor:
        self.input, self.version = x, _version(x)
        return self._hand_on(x.detach() if self.match.adds else self.run())

    def _hand_on(self, y: torch.Tensor) -> torch.Tensor:
        self.position += 1
        self.pending = y if self.position < len(self.chain) else None
        return y

    def passes(self, member: nn.Module, y: object) -> bool:
        """Whether `y` is the group's result on its way through this member."""
        if self.pending is None or y is not self.pending or self.chain[self.position] is not member:
            return False
        self._hand_on(y)
        return True

    def apply(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What the function makes of the group's result when it is the next in the chain; else NotImplemented."""
        awaited = self.chain[self.position]
        if isinstance(awaited, nn.Module):
            return NotImplemented
        called = reading.function_of(function, args, kwargs)
        if isinstance(awaited, Addition):
            return self._add(function, args) if isinstance(called, Addition) else NotImplemented
        if args[0] is self.pending and called is not None and called[:2] == awaited[:2]:
            return self._hand_on(self.pending)
        return NotImplemented

    def _add(self, function: Any, args: Sequence[Any]) -> Any:
        residual = args[1] if args[0] is self.pending else args[0]
        overwrites = function in reading.IN_PLACE_ADDITIONS and residual is args[0]
        x, stand_in, self.pending = self.input, self.pending, None
        if (
            not overwrites
            and isinstance(residual, torch.Tensor)
            and (residual.shape, residual.dtype, residual.device) == (x.shape, x.dtype, x.device)
        ):
            return self._hand_on(self.run(residual))
        # Broadcast, promoted and overwritten operands are left to the function itself.
        self.match = Match(1)
        y = self.run()
        return function(*(y if operand is stand_in else operand for operand in args))


class FusedMember(Substitute):
    """A module of a group: computes the group or lets its result pass while armed, itself otherwise."""

    _fused_state = "_fused_calls"
    # For new instances of an exchanged class, which are in no group.
    _fused_calls: Mapping[int, tuple[_Call, ...]] = types.MappingProxyType({})

    def forward(self, *args, **kwargs):
        calls = () if kwargs or len(args) != 1 else self._fused_calls.get(_thread(), ())
        for call in calls:
            if call.passes(self, args[0]):
                return args[0]
        for call in calls:
            if call.chain[0] is self and call.position == 0 and patterns.applies_to(args[0]):
                return call.start(args[0])
        return super().forward(*args, **kwargs)

    def arm(self, call: _Call) -> None:
        """Takes part in this call, in this thread."""
        self._fused_calls[_thread()] = (*self._fused_calls.get(_thread(), ()), call)

    def disarm(self, call: _Call) -> None:
        """Takes part in it no longer."""
        remaining = tuple(c for c in self._fused_calls.get(_thread(), ()) if c is not call)
        if remaining:
            self._fused_calls[_thread()] = remaining
        else:
            self._fused_calls.pop(_thread(), None)


class _Functions(patterns.Watch):
    """Shows the groups that contain functions every function that is called, so that they find theirs."""

    def __init__(self, calls: list[_Call]):
        super().__init__()
        self.calls = calls

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for call in self.calls:
            if call.pending is not None and any(operand is call.pending for operand in args[:2]):
                result = call.apply(function, args, kwargs)
                if result is not NotImplemented:
                    return result
        return function(*args, **kwargs)


def _resolve(owner: nn.Module, path: str) -> nn.Module | None:
    """The member at `path`; None when what stands there, or on the way, is no longer what was traced."""
    module = owner
    *parents, last = path.split(".")
    for name in parents:
        module = module._modules.get(name)
        if module is None or not is_container(module) or reading.has_hooks(module):
            return None
    module = module._modules.get(last)
    return module if isinstance(module, FusedMember) and module._fused_state in module.__dict__ else None


def _seen_by_modes(chain: list[Any]) -> list[Any]:
    """The chain up to a function that torch.compile replaces by what is inside it, before a mode could see it."""
    return chain[:-1] if isinstance(chain[-1], Functional) and chain[-1].activation == "hardswish" else chain


def _prepare(owner: nn.Module, group: Group, impl: str) -> _Call | None:
    chain = [_resolve(owner, element) if isinstance(element, str) else element for element in group.chain]
    if any(element is None for element in chain):
        return None
    if torch.compiler.is_compiling():
        chain = _seen_by_modes(chain)
    match = group.pattern.match(chain)
    return None if isinstance(match, str) else _Call(group, match, chain[: match.length], impl)


class FusedOwner(Substitute):
    """A module whose forward was traced: runs it with its groups armed.

    A call with other arguments than those that were traced, optional ones among them, runs as it always did.
    """

    _fused_state = "_fused_plan"
    _fused_plan = OwnerPlan((), (), "auto")

    def forward(self, *args, **kwargs):
        groups, arguments, impl = self._fused_plan
        traced_form = len(args) + len(kwargs) == len(arguments) and all(name in arguments for name in kwargs)
        if torch.compiler.is_exporting() or not traced_form:
            return super().forward(*args, **kwargs)
        prepared = [_prepare(self, group, impl) for group in groups]
        calls = [call for call in prepared if call is not None]
        for call in calls:
            for member in call.modules:
                member.arm(call)
        try:
            functional = [call for call in calls if len(call.modules) < len(call.chain)]
            if functional:
                with _Functions(functional):
                    output = super().forward(*args, **kwargs)
            else:
                output = super().forward(*args, **kwargs)
        finally:
            for call in calls:
                for member in call.modules:
                    member.disarm(call)
        for call in calls:
            if call.pending is not None:
                raise RuntimeError(
                    f"{type(self).__name__}: the output of {call.group.modules[0]!r} did not go through "
                    "all that followed it in fuse(); call unfuse() before forward changes its ways"
                )
        return output
