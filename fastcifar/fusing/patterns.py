"""Chains of layers that one operator replaces.

A chain is what follows a module, each element fed by nothing but the one before it (an addition also by its other
operand) and feeding nothing but the next: modules, functions, and at the end a sentence saying why it goes no further.

A pattern has four members. `operator`: its name. `begins(module)`: the report names such a module even when nothing
can be fused. `match(chain)`: what can be fused of this chain, as its modules are now, or the reason why nothing can; a
chain that ends before something can be fused is refused with its own last sentence. `run(match, modules, x, residual,
impl)`: the output of the chain's last matched element, all buffers updated as its modules would.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn, overrides

from fastcifar import functional
from fastcifar.fusing import reading
from fastcifar.fusing.reading import Addition, Functional
from fastcifar.nn.batch_norm import advance_batch_norm

Element = nn.Module | Functional | Addition | str
LONGEST = 3


class Match(NamedTuple):
    """How many elements of a chain the operator replaces, with which activation, and whether it adds a residual."""

    length: int
    activation: str = "none"
    negative_slope: float = 0.01
    adds: bool = False


def _after_norm(chain: Sequence[Element], position: int, *, may_add: bool) -> Match | str:
    """The match of a chain that can be fused up to the batch normalisation at `position`, with what follows that."""
    activation = reading.built_in_activation(chain[position])
    if isinstance(activation, str):
        return activation
    length = position + 1
    if activation is not None:
        return Match(length, *activation)
    adds = may_add and len(chain) > length and isinstance(chain[length], Addition)
    length += adds
    activation = reading.activation_of(chain[length]) if len(chain) > length else None
    return Match(length, adds=adds) if activation is None else Match(length + 1, *activation, adds)


def _norm_arguments(norm: nn.Module, match: Match) -> tuple[tuple[torch.Tensor | None, ...], dict[str, Any]]:
    """What the operators take of a batch normalisation and its activation; counts the batch."""
    state = advance_batch_norm(norm)
    options = {
        "activation": match.activation,
        "negative_slope": match.negative_slope,
        "training": state.training,
        "momentum": state.momentum,
        "eps": norm.eps,
        "process_group": reading.synchronised_group(norm),
    }
    return (norm.weight, norm.bias, state.running_mean, state.running_var), options


class DepthwiseConvBNAct:
    """Depthwise Conv2d → BatchNorm2d (or SyncBatchNorm, or timm's BatchNormAct2d) → activation, if there is one."""

    operator = "depthwise_conv_bn_act"

    def begins(self, module: nn.Module) -> bool:
        """A convolution with groups, of any kind."""
        return reading.is_grouped_convolution(module)

    def match(self, chain: Sequence[Element]) -> Match | str:
        """What can be fused of this chain, or the reason why nothing can."""
        conv, *rest = chain
        obstacle = reading.depthwise_obstacle(conv)
        if obstacle is not None:
            return obstacle
        norm = rest[0]
        if isinstance(norm, str):
            return norm
        if not reading.is_batch_norm(norm):
            return f"followed by {reading.describe(norm)}, not by BatchNorm2d"
        obstacle = reading.batch_norm_obstacle(norm)
        if obstacle is None and norm.num_features != conv.out_channels:
            obstacle = f"{reading.describe(norm)} has {norm.num_features} channels, the convolution {conv.out_channels}"
        return obstacle or _after_norm(chain, 1, may_add=False)

    def run(self, match: Match, modules: Sequence[nn.Module], x: torch.Tensor, residual, impl: str) -> torch.Tensor:
        """The operator on x [N, C, H, W]; there is no residual."""
        conv, norm = modules[:2]
        tensors, options = _norm_arguments(norm, match)
        geometry = {"stride": conv.stride, "padding": reading.padding_of(conv), "dilation": conv.dilation}
        return functional.depthwise_conv_bn_act(x, conv.weight, *tensors, **geometry, **options, impl=impl)


class BatchNormAct:
    """BatchNorm2d (or SyncBatchNorm, or timm's BatchNormAct2d) → addition → activation, if there are such."""

    operator = "batch_norm_act"

    def begins(self, module: nn.Module) -> bool:
        """A batch normalisation of images, of any kind."""
        return reading.is_batch_norm(module)

    def match(self, chain: Sequence[Element]) -> Match | str:
        """What can be fused of this chain, or the reason why nothing can."""
        return reading.batch_norm_obstacle(chain[0]) or _after_norm(chain, 0, may_add=True)

    def run(self, match: Match, modules: Sequence[nn.Module], x: torch.Tensor, residual, impl: str) -> torch.Tensor:
        """The operator on x [N, C, H, W]; the residual has the shape of x, or is None."""
        tensors, options = _norm_arguments(modules[0], match)
        return functional.batch_norm_act(x, *tensors, residual, **options, impl=impl)


Pattern = DepthwiseConvBNAct | BatchNormAct
PATTERNS: tuple[Pattern, ...] = (DepthwiseConvBNAct(), BatchNormAct())


def beginning_at(module: nn.Module, patterns: Sequence[Pattern] = PATTERNS) -> Pattern | None:
    """The pattern that could start at this module."""
    return next((pattern for pattern in patterns if pattern.begins(module)), None)


class Watch(overrides.TorchFunctionMode):
    """A mode that looks for functions between operators. They contain none of those, but many others to slow down."""


def _is_channels_last(tensor: torch.Tensor) -> bool:
    """By the strides of [N, C, H, W], as torch's own layers tell it (`suggest_memory_format` in C++)."""
    least = 0
    for dim in (1, 3, 2):
        if tensor.stride(dim) < least:
            return False
        least = tensor.stride(dim) * tensor.shape[dim]
    return tensor.stride(0) >= least > tensor.stride(1) > 0


def _run(pattern: Pattern, match: Match, modules: Sequence[nn.Module], x, residual, impl: str) -> torch.Tensor:
    y = pattern.run(match, modules, x, residual, impl)
    decisive = (x, *(module.weight for module in modules if isinstance(module, nn.Conv2d)))
    return y if y.is_contiguous() or any(_is_channels_last(t) for t in decisive) else y.contiguous()


def run(pattern: Pattern, match: Match, modules: Sequence[nn.Module], x, residual, impl: str) -> torch.Tensor:
    """Runs the operator of a match, unseen by a watch. Its output is contiguous, at the price of a copy, where that of
    the modules would be: unless x, or the weight of a convolution, is channels-last."""
    if torch.compiler.is_compiling() or not isinstance(overrides._get_current_function_mode(), Watch):
        return _run(pattern, match, modules, x, residual, impl)
    with overrides._pop_mode_temporarily():
        return _run(pattern, match, modules, x, residual, impl)


def applies_to(x: object) -> bool:
    """Fused operators run on batches of images, in eager and compiled code. Tracers and exporters see the modules that
    were there before, so that what they record needs nothing of this package; so do the transforms of torch.func, for
    which the operators have no rules."""
    return (
        isinstance(x, torch.Tensor)
        and x.dim() == 4
        and not torch.jit.is_tracing()
        and not torch.compiler.is_exporting()
        and not torch._C._are_functorch_transforms_active()
        and not nn.modules.module._has_any_global_hook()
    )
