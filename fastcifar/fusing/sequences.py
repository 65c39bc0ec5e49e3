"""Groups that stand side by side in an `nn.Sequential`: there the order of the children is the dataflow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import nn

from fastcifar.fusing import patterns, reading
from fastcifar.fusing.patterns import LONGEST, Match, Pattern
from fastcifar.fusing.substitution import Substitute

LAST = "it is the last of its Sequential"


class FusedSequence(Substitute):
    """Runs the children in order, the groups that begin at the planned ones as one operator each.

    What a group is made of is read at every call, so that a child that has been exchanged, or has got a hook, since
    `fuse()` runs as it is; the children themselves are never touched.
    """

    _fused_state = "_fused_implementations"
    _fused_implementations: dict[str, str] = {}

    def forward(self, input):
        children = list(self._modules.values())
        taken = 0
        for index, name in enumerate(self._modules):
            if index < taken:
                continue
            impl = self._fused_implementations.get(name)
            pattern = None if impl is None else patterns.beginning_at(children[index])
            if pattern is None or not patterns.applies_to(input):
                input = children[index](input)
                continue
            match = pattern.match([*children[index : index + LONGEST], LAST])
            if isinstance(match, str):
                input = children[index](input)
                continue
            taken = index + match.length
            input = patterns.run(pattern, match, children[index:taken], input, None, impl)
        return input


class Place(NamedTuple):
    """A child that begins a pattern, the names of its group here and its activation, or the reason why it has none;
    `open` when what follows the Sequential could belong to the group."""

    pattern: Pattern
    names: tuple[str, ...]
    match: Match | str
    open: bool


def find(sequence: nn.Sequential, chosen: Sequence[Pattern]) -> Iterator[Place]:
    """Every child of `sequence` that begins one of the chosen patterns and is not in the group of another."""
    names, children = list(sequence._modules), list(sequence._modules.values())
    taken = 0
    for index, child in enumerate(children):
        pattern = patterns.beginning_at(child, chosen)
        if pattern is None or index < taken:
            continue
        match = pattern.match([*children[index : index + LONGEST], LAST])
        if isinstance(match, str):
            yield Place(pattern, (names[index],), match, match == LAST)
            continue
        taken = index + match.length
        yield Place(pattern, tuple(names[index:taken]), match, taken == len(names) and match.activation == "none")


def is_container(module: nn.Module) -> bool:
    """A module that only holds others, or runs them in order: a forward that calls them belongs to what is above."""
    return reading.forward_of(module) is nn.Module.forward or reading.is_sequence(module)
