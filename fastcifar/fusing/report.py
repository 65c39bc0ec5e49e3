"""What `fuse` did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Fused:
    """One group that runs as one operator: the paths of its modules, and a functional activation by its name."""

    path: str
    operator: str
    members: tuple[str, ...]
    activation: str


@dataclass(frozen=True)
class Skipped:
    """A module that could have begun a group, and why it runs as it did."""

    path: str
    reason: str


def _beside(path: str, others: Sequence[str]) -> str:
    parent = path.rpartition(".")[0]
    return " + ".join(other.removeprefix(f"{parent}.") for other in others)


@dataclass(frozen=True, repr=False)
class Report:
    """What was fused and why the rest was not; `print` shows it as a table.

    Attributes:
        model: the class of the model.
        impl: the implementation that the operators were asked to take.
        fused: one entry a group, in the order of the model's modules.
        skipped: one entry for each module that could have begun a group and does not.
        other_convolutions: how many convolutions are not depthwise, and so were not looked at.
    """

    model: str
    impl: str
    fused: tuple[Fused, ...]
    skipped: tuple[Skipped, ...]
    other_convolutions: int

    def _summary(self) -> str:
        return (
            f"{self.model}: {len(self.fused)} fused, {len(self.skipped)} not, "
            f'{self.other_convolutions} other convolutions; impl="{self.impl}"'
        )

    def __repr__(self) -> str:
        return f"<{self._summary()}>"

    def __str__(self) -> str:
        rows = [("fused", f.path, _beside(f.path, f.members[1:]), f.activation) for f in self.fused]
        rows += [("not fused", s.path, s.reason, "") for s in self.skipped]
        if not rows:
            return self._summary()
        rows.insert(0, ("", "module", "with, or why not", "activation"))
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]]) for row in rows]
        return "\n".join([self._summary(), *(line.rstrip() for line in lines)])
