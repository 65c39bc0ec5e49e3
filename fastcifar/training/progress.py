"""What a person sees while a run goes on: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any


def format_duration(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def format_row(row: dict[str, Any], steps: int) -> str:
    """One row of metrics as a line."""
    parts = [f"step {row['step']}/{steps}"]
    labels = (
        ("train_loss", "loss {:.4f}"),
        ("train_accuracy", "train {:.2f} %"),
        ("test_accuracy", "test {:.2f} %"),
        ("loss_d", "D {:.3f}"),
        ("loss_g", "G {:.3f}"),
        ("logit_real", "D(real) {:+.2f}"),
        ("logit_fake", "D(fake) {:+.2f}"),
        ("weight_real", "w_r {:.3f}"),
        ("weight_fake", "w_f {:.3f}"),
        ("cosine", "cos {:+.2f}"),
        ("kimg", "{:,.0f} kimg"),
        ("seconds_per_kimg", "{:.2f} s/kimg"),
        ("memory_mib", "{:,.0f} MiB"),
        ("fd", "FD {:.2f}"),
        ("fid", "FID {:.2f}"),
        ("kid", "KID {:.4f}"),
        ("learning_rate", "lr {:.4g}"),
        ("images_per_second", "{:,.0f} images/s"),
    )
    parts += [text.format(row[key]) for key, text in labels if row.get(key) is not None]
    if row.get("seconds") and row["step"]:
        parts.append(f"ETA {format_duration(row['seconds'] / row['step'] * (steps - row['step']))}")
    return " · ".join(parts)


class Lines:
    """Plain lines on standard output.

    Args:
        steps: of the whole run.
        log: also given every line, without the newline.
    """

    def __init__(self, steps: int, log: Callable[[str], None]):
        self.steps, self.log = steps, log

    def message(self, text: str) -> None:
        """A line of its own."""
        self.log(text)
        with contextlib.suppress(OSError):  # a closed pipe or a full disk must not end the run
            print(text, flush=True)

    def show(self, row: dict[str, Any]) -> None:
        """The newest metrics."""
        self.message(format_row(row, self.steps))

    def close(self) -> None:
        """Nothing to end."""


class Silent(Lines):
    """For all processes but the first."""

    def __init__(self, steps: int):
        super().__init__(steps, log=lambda text: None)

    def message(self, text: str) -> None:
        """Says nothing."""


class Bar(Lines):
    """A progress bar of rich on a terminal; evaluations and messages scroll above it."""

    def __init__(self, steps: int, log: Callable[[str], None]):
        from rich.progress import BarColumn, Progress, TextColumn

        super().__init__(steps, log)
        self.progress = Progress(BarColumn(bar_width=24), TextColumn("{task.description}"))
        self.task = self.progress.add_task(f"step 0/{steps}", total=steps)
        self.progress.start()

    def message(self, text: str) -> None:
        """A line above the bar."""
        self.log(text)
        self.progress.console.print(text, markup=False, highlight=False)

    def show(self, row: dict[str, Any]) -> None:
        """The newest metrics; evaluations leave a line."""
        line = format_row(row, self.steps)
        self.progress.update(self.task, completed=row["step"], description=line)
        if any(row.get(name) is not None for name in ("test_accuracy", "fd", "fid")):
            self.message(line)
        else:
            self.log(line)

    def close(self) -> None:
        """Leaves the terminal as it was."""
        self.progress.stop()


def reporter(steps: int, log: Callable[[str], None] | None) -> Lines:
    """The bar where standard output is a terminal and rich is installed, lines elsewhere, silence without a log."""
    if log is None:
        return Silent(steps)
    if sys.stdout.isatty():
        try:
            return Bar(steps, log)
        except ImportError:
            pass
    return Lines(steps, log)
