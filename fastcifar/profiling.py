"""NVTX ranges of steps, phases and operators, for Nsight Systems and Nsight Compute; off until asked for."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

# Names of the decorated operators.
OPERATORS: set[str] = set()
_domain: Any = None
_NOTHING = contextlib.nullcontext()


def enable(domain: Any = None) -> None:
    """Ranges from now on, in the NVTX domain "fastcifar", or in what takes its place.

    Args:
        domain: has `get_event_attributes(message=…)`, `push_range(attributes)` and `pop_range()`, as a domain of the
            package nvtx has.

    Raises:
        ValueError: the package nvtx is missing.
    """
    global _domain
    if domain is not None:
        _attributes.cache_clear()
        _domain = domain
        return
    try:
        import nvtx
    except ImportError as error:
        raise ValueError("NVTX ranges need the package nvtx, which is not installed; run `pip install nvtx`") from error
    _attributes.cache_clear()
    _domain = nvtx.get_domain("fastcifar")


def disable() -> None:
    """No ranges from now on."""
    global _domain
    _domain = None


def enabled() -> bool:
    """Whether ranges are made."""
    return _domain is not None


@functools.cache
def _attributes(name: str) -> Any:
    return _domain.get_event_attributes(message=name)


class _Range:
    __slots__ = ("_domain", "_name")

    def __init__(self, domain: Any, name: str):
        self._domain, self._name = domain, name

    def __enter__(self) -> None:
        self._domain.push_range(_attributes(self._name))

    def __exit__(self, *exception: object) -> None:
        self._domain.pop_range()


def annotate(name: str) -> contextlib.AbstractContextManager:
    """`with annotate("forward"):` is a range of that name, or nothing where ranges are off."""
    return _NOTHING if _domain is None else _Range(_domain, name)


def annotated(name: str) -> Callable[[Callable], Callable]:
    """Makes each call of the decorated function a range; for functions that torch.compile does not trace."""

    def decorate(function: Callable) -> Callable:
        OPERATORS.add(name)

        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            if _domain is None:
                return function(*arguments, **options)
            with _Range(_domain, name):
                return function(*arguments, **options)

        return call

    return decorate
