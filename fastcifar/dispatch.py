"""Which implementation of an operator runs, and why the others do not. Nothing else in the package decides this.

Every operator has implementations in order of preference. Each says, for the call at hand, either that it can run or
why it cannot; `impl="auto"` takes the first that can and would, a named `impl` runs or raises.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch


@dataclass(frozen=True)
class Call:
    """The facts that a choice rests on: no tensor, so that `explain()` can ask about calls that nobody made.

    `kernel_size` is (height, width) of a convolution, None for operators without one.
    """

    device: torch.device
    dtype: torch.dtype
    kernel_size: tuple[int, int] | None = None
    training: bool = True


@dataclass(frozen=True)
class Implementation:
    """One way to run an operator. `obstacle(call)` is None, or why it cannot run; `reluctance(call)` is None, or why
    `auto` prefers the next one although this one could run."""

    name: str
    load: Callable[[], Callable | ModuleType]
    obstacle: Callable[[Call], str | None]
    reluctance: Callable[[Call], str | None] = lambda call: None


def _always(call: Call) -> str | None:
    return None


# Import statements and not importlib: torch.compile traces through these.


def _reference_depthwise() -> Callable:
    from fastcifar import reference

    return reference.depthwise_conv_bn_act


def _reference_batch_norm_act() -> Callable:
    from fastcifar import reference

    return reference.batch_norm_act


def _triton_depthwise() -> Callable:
    from fastcifar.ops import depthwise

    return depthwise.depthwise_conv_bn_act


def _native_depthwise() -> Callable:
    from fastcifar.ops import depthwise_native

    return depthwise_native.depthwise_conv_bn_act


def _triton_batch_norm_act() -> Callable:
    from fastcifar.ops import batch_norm

    return batch_norm.batch_norm_act


def _native_batch_norm_act() -> Callable:
    from fastcifar.ops import batch_norm_native

    return batch_norm_native.batch_norm_act


@functools.cache
def _has_triton() -> bool:
    # Looking for it takes longer than a small operator.
    return importlib.util.find_spec("triton") is not None


_LOW_AND_SINGLE = (torch.float32, torch.float16, torch.bfloat16)


def _triton_obstacle(call: Call) -> str | None:
    """What every Triton kernel needs."""
    if not _has_triton():
        return "Triton is not installed; run `pip install triton`"
    if call.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton runs on CUDA tensors; on the CPU only its interpreter does (TRITON_INTERPRET=1)"
    if call.device.type not in ("cpu", "cuda"):
        return f"Triton kernels run on CUDA tensors, not on {call.device.type}"
    if call.dtype not in _LOW_AND_SINGLE:
        return f"Triton kernels compute float32, float16 and bfloat16, not {_name(call.dtype)}"
    if call.device.type == "cuda" and torch.cuda.get_device_capability(call.device) < (8, 0):
        return "Triton kernels need compute capability 8.0 or higher"
    return None


def _triton_depthwise_obstacle(call: Call) -> str | None:
    if call.kernel_size not in ((3, 3), (5, 5), (7, 7)):
        size = "×".join(str(side) for side in call.kernel_size or ())
        return f"Triton kernels convolve with 3×3, 5×5 and 7×7 weights, not {size}"
    return _triton_obstacle(call)


def _triton_reluctance(call: Call) -> str | None:
    return "Triton's interpreter is for tests" if call.device.type == "cpu" else None


def _native_obstacle(call: Call) -> str | None:
    """What the compiled CPU core needs."""
    from fastcifar import native

    if call.device.type != "cpu":
        return f"the compiled core runs on CPU tensors, not on {call.device.type}"
    if call.dtype not in _LOW_AND_SINGLE:
        return f"the compiled core computes float32, float16 and bfloat16, not {_name(call.dtype)}"
    return native.why_not()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _no_native_aw_hinge(call: Call) -> str | None:
    from fastcifar import native

    reason = native.why_not()
    if reason is not None or call.device.type == "cpu":
        return reason
    if call.device.type != "cuda" or torch.version.cuda is None:
        return f"the compiled module has no code for {call.device.type} tensors on this build of torch"
    reason = native.cuda_obstacle()
    if reason is not None:
        return reason
    major, minor = torch.cuda.get_device_capability(call.device)
    return None if major >= 8 else f"the compiled module holds code for sm_80 and later, this GPU is sm_{major}{minor}"


def _load_aw_hinge() -> ModuleType:
    from fastcifar.ops import aw_hinge

    return aw_hinge


def _load_reference_aw_hinge() -> ModuleType:
    from fastcifar import reference_aw_hinge

    return reference_aw_hinge


def _native_spectral_obstacle(call: Call) -> str | None:
    from fastcifar import native

    if call.device.type != "cpu":
        return f"the compiled module normalises weights on the CPU, not on {call.device.type}"
    if call.dtype not in (torch.float32, torch.float64):
        return f"the compiled module normalises float32 and float64 weights, not {_name(call.dtype)}"
    return native.why_not()


def _kernel_spectral(function: str, impl: str) -> Callable[[], Callable]:
    def load() -> Callable:
        from fastcifar.ops import spectral

        return functools.partial(getattr(spectral, function), impl=impl)

    return load


def _reference_spectral(function: str) -> Callable[[], Callable]:
    def load() -> Callable:
        from fastcifar import reference_spectral

        return getattr(reference_spectral, function)

    return load


def _spectral(function: str) -> list[Implementation]:
    return [
        Implementation("triton", _kernel_spectral(function, "triton"), _triton_obstacle, _triton_reluctance),
        Implementation("native", _kernel_spectral(function, "native"), _native_spectral_obstacle),
        Implementation("reference", _reference_spectral(function), _always),
    ]


def _kernel_augment(impl: str) -> Callable[[], Callable]:
    def load() -> Callable:
        from fastcifar.ops import augment

        return functools.partial(augment.augment, impl=impl)

    return load


def _reference_augment() -> Callable:
    from fastcifar import reference_augment

    return reference_augment.augment


_OPERATORS: dict[str, list[Implementation]] = {
    "depthwise_conv_bn_act": [
        Implementation(
            "triton",
            _triton_depthwise,
            _triton_depthwise_obstacle,
            _triton_reluctance,
        ),
        Implementation("native", _native_depthwise, _native_obstacle),
        Implementation("reference", _reference_depthwise, _always),
    ],
    "batch_norm_act": [
        Implementation("triton", _triton_batch_norm_act, _triton_obstacle, _triton_reluctance),
        Implementation("native", _native_batch_norm_act, _native_obstacle),
        Implementation("reference", _reference_batch_norm_act, _always),
    ],
    # Three phases between two backward passes: what loads is a module with all of them.
    "aw_hinge": [
        Implementation("native", _load_aw_hinge, _no_native_aw_hinge),
        Implementation("reference", _load_reference_aw_hinge, _always),
    ],
    "spectral_normalize": _spectral("spectral_normalize"),
    # The same with u and v written in place, for `SpectralNormGroup`.
    "spectral_advance": _spectral("advance"),
    "augment": [
        Implementation("triton", _kernel_augment("triton"), _triton_obstacle, _triton_reluctance),
        Implementation("native", _kernel_augment("native"), _native_obstacle),
        Implementation("reference", _reference_augment, _always),
    ],
}


def operators() -> list[str]:
    """Names of all operators that have a choice of implementations."""
    return list(_OPERATORS)


def implementations(operator: str) -> list[Implementation]:
    """The operator's implementations, best first."""
    return list(_OPERATORS[operator])


def select(operator: str, impl: str, call: Call) -> Any:
    """The function that runs `operator` for this call.

    Raises:
        ValueError: `impl` names an implementation that this operator does not have.
        RuntimeError: the named implementation cannot run this call; the message says what is missing.
    """
    name = _choose(operator, impl, call.device, call.dtype, call.kernel_size, call.training)
    for implementation in _OPERATORS[operator]:
        if implementation.name == name:
            return implementation.load()
    raise AssertionError(name)


def _choose(
    operator: str,
    impl: str,
    device: torch.device,
    dtype: torch.dtype,
    kernel_size: tuple[int, int] | None,
    training: bool,
) -> str:
    """The name of the implementation for this call."""
    call = Call(device, dtype, kernel_size, training)
    available = _OPERATORS[operator]
    if impl == "auto":
        able = [i for i in available if i.obstacle(call) is None]
        willing = [i for i in able if i.reluctance(call) is None]
        return (willing or able)[0].name
    for implementation in available:
        if implementation.name == impl:
            obstacle = implementation.obstacle(call)
            if obstacle is not None:
                raise RuntimeError(f'{operator}: impl="{impl}" cannot run here: {obstacle}')
            return impl
    names = ", ".join(i.name for i in available)
    raise ValueError(f'{operator}: has no implementation "{impl}" (it has: {names})')


# What torch.compiler.assume_constant_result sets; calling that would import the compiler, and Triton with it.
_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def explain(operator: str | None = None, call: Call | None = None) -> str:
    """Says, a line an implementation, which one `impl="auto"` takes and why the others are passed over.

    Args:
        operator: one operator's name; None for all.
        call: the call to explain; None for a bfloat16 training call with a 3×3 kernel on the GPU, or without one on
            the CPU.

    Raises:
        ValueError: no operator of that name.
    """
    if operator is not None and operator not in _OPERATORS:
        raise ValueError(f"explain: unknown operator {operator!r} (there are: {', '.join(_OPERATORS)})")
    if call is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        call = Call(device=device, dtype=torch.bfloat16, kernel_size=(3, 3))
    lines = []
    for name in [operator] if operator else list(_OPERATORS):
        lines.append(f"{name} ({call.device.type}, {_name(call.dtype)}):")
        taken = False
        for implementation in _OPERATORS[name]:
            reason = implementation.obstacle(call)
            if reason is None and not taken:
                reason = implementation.reluctance(call)
                verdict = "runs" if reason is None else f"passed over by auto: {reason}"
                taken = reason is None
            else:
                verdict = f"cannot run: {reason}" if reason else "could run"
            lines.append(f"  {implementation.name:<10} {verdict}")
    return "\n".join(lines)
