"""Chains of layers that one operator replaces.

A chain is what follows a module, each element fed by nothing but the one before it and feeding nothing but the next:
modules, functional activations, and at the end a sentence saying why it goes no further. Another operator is another
class with the four members of `Pattern`, and an entry in `PATTERNS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import nn

from fastcifar import functional
from fastcifar.fusing import reading
from fastcifar.fusing.reading import Functional

Element = nn.Module | Functional | str


class Match(NamedTuple):
    """How many elements of a chain the operator replaces, and with which activation."""

    length: int
    activation: str
    negative_slope: float


class Pattern(Protocol):
    """A chain of layers and the operator that equals it; without state."""

    operator: str

    @property
    def longest(self) -> int:
        """The greatest length of a match."""

    def begins(self, module: nn.Module) -> bool:
        """A match could start here: the report names such a module even when nothing can be fused."""

    def match(self, chain: Sequence[Element]) -> Match | str:
        """What can be fused of this chain, as its modules are now, or the reason why nothing can.

        A chain that ends before something can be fused is refused with its own last sentence.
        """

    def run(self, match: Match, members: Sequence[nn.Module], x: torch.Tensor, impl: str) -> torch.Tensor:
        """The output of the chain's last matched element; updates buffers as the members would."""


class DepthwiseConvBNAct:
    """Depthwise Conv2d → BatchNorm2d (or SyncBatchNorm, or timm's BatchNormAct2d) → activation, if there is one."""

    operator = "depthwise_conv_bn_act"
    longest = 3

    def begins(self, module: nn.Module) -> bool:
        return reading.is_grouped_convolution(module)

    def match(self, chain: Sequence[Element]) -> Match | str:
        conv, *rest = chain
        obstacle = reading.depthwise_obstacle(conv)
        if obstacle is None:
            norm = rest[0] if rest else "nothing follows it"
            obstacle = reading.batch_norm_obstacle(norm, conv.out_channels)
        if obstacle is not None:
            return obstacle
        activation = reading.built_in_activation(norm)
        if isinstance(activation, str):
            return activation
        if activation is not None:
            return Match(2, *activation)
        activation = reading.activation_of(rest[1]) if len(rest) > 1 else None
        return Match(2, "none", 0.01) if activation is None else Match(3, *activation)

    def run(self, match: Match, members: Sequence[nn.Module], x: torch.Tensor, impl: str) -> torch.Tensor:
        conv, norm = members[:2]
        state = reading.advance_batch_norm(norm)
        return functional.depthwise_conv_bn_act(
            x,
            conv.weight,
            norm.weight,
            norm.bias,
            state.running_mean,
            state.running_var,
            stride=conv.stride,
            padding=reading.padding_of(conv),
            dilation=conv.dilation,
            activation=match.activation,
            negative_slope=match.negative_slope,
            training=state.training,
            momentum=state.momentum,
            eps=norm.eps,
            process_group=state.process_group,
            impl=impl,
        )


PATTERNS: tuple[Pattern, ...] = (DepthwiseConvBNAct(),)


def beginning_at(module: nn.Module) -> Pattern | None:
    """The pattern that could start at this module."""
    return next((pattern for pattern in PATTERNS if pattern.begins(module)), None)


def applies_to(x: object) -> bool:
    """Fused operators run on batches of images, in eager and compiled code. Tracers and exporters see the modules that
    were there before, so that what they record needs nothing of this package."""
    return (
        isinstance(x, torch.Tensor)
        and x.dim() == 4
        and not torch.jit.is_tracing()
        and not torch.compiler.is_exporting()
        and not nn.modules.module._has_any_global_hook()
    )
