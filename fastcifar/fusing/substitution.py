"""Exchanges a module's class for a subclass with another forward, and restores it: the object, its parameters, buffers,
hooks, children and keys stay what they were."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import nn


class Substitute:
    """Base of all mixins that `substitute` puts in front of a module's class; `_fused_state` names what they keep."""

    _fused_original: type[nn.Module]
    _fused_state = ""

    def __reduce_ex__(self, protocol):
        reduced = super().__reduce_ex__(protocol)
        function, arguments, *rest = reduced
        if not arguments or arguments[0] is not type(self):
            return reduced
        cls = type(self)
        mixins = []
        while issubclass(cls, Substitute) and "_fused_original" in cls.__dict__:
            mixins.append(cls.__bases__[0])
            cls = cls._fused_original
        return (_rebuild, (tuple(reversed(mixins)), function, cls, *arguments[1:]), *rest)


@functools.cache
def _class(mixin: type[Substitute], original: type[nn.Module]) -> type[nn.Module]:
    # The signature stays for those who inspect it, and the module's name because torch.fx tells layers apart by it.
    @functools.wraps(original.forward)
    def forward(self, *args, **kwargs):
        return mixin.forward(self, *args, **kwargs)

    members = {
        "__module__": original.__module__,
        "__doc__": original.__doc__,
        "_fused_original": original,
        "_fused_forward": getattr(original, "_fused_forward", original.forward),
        "forward": forward,
    }
    return type(original)(f"Fused{original.__name__.removeprefix('Fused')}", (mixin, original), members)


def _rebuild(mixins, function, original, *arguments):
    module = function(original, *arguments)
    for mixin in mixins:
        module.__class__ = _class(mixin, type(module))
    return module


def substitute(exchanges: Sequence[tuple[nn.Module, type[Substitute], Any]]) -> str | None:
    """Puts each mixin in front of its module's class and the state where the mixin looks for it, unless it is there
    already; when a class does not take part, nothing is exchanged and the reason comes back."""
    done = []
    for module, mixin, state in exchanges:
        if isinstance(module, mixin):
            continue
        try:
            module.__class__ = _class(mixin, type(module))
        except Exception as error:  # whatever a class may raise when another is derived from it
            for earlier in reversed(done):
                _undo(earlier)
            text = str(error).strip() or type(error).__name__
            return f"no class can be derived from {type(module).__name__}: {text.splitlines()[0]}"
        module.__dict__[mixin._fused_state] = state
        done.append(module)
    return None


def _undo(module: nn.Module) -> None:
    module.__dict__.pop(type(module)._fused_state, None)
    module.__class__ = type(module)._fused_original


def check_restorable(module: nn.Module) -> None:
    """Raises ValueError when something has derived another class from that of a fused module."""
    if isinstance(module, Substitute) and "_fused_original" not in type(module).__dict__:
        raise ValueError(
            f"unfuse: {type(module).__name__} was derived from a fused class after fuse(); remove the parametrisation "
            "(or what else changed the class) first"
        )


def restore(module: nn.Module) -> bool:
    """Gives a module the class it had before; returns whether it had another."""
    changed = isinstance(module, Substitute)
    while isinstance(module, Substitute):
        _undo(module)
    return changed
