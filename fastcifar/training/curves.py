"""The picture of a run: loss and accuracy over the steps."""

from __future__ import annotations

import pathlib
from typing import Any


def draw_curves(rows: list[dict[str, Any]], path: pathlib.Path, title: str) -> str | None:
    """Draws `curves.png` from rows of metrics; returns None, or why there is no picture."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        return f"no {path.name}: matplotlib cannot be imported ({error}); run `pip install matplotlib`"
    figure = Figure(figsize=(9, 3.8), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    loss, accuracy = figure.subplots(1, 2)
    for axes, name, label in ((loss, "loss", "cross-entropy"), (accuracy, "accuracy", "accuracy, %")):
        for part, style in (("train", {"color": "tab:blue", "alpha": 0.8}), ("test", {"color": "tab:red"})):
            points = [(row["step"], row[f"{part}_{name}"]) for row in rows if row.get(f"{part}_{name}") is not None]
            if points:
                marker = "o" if part == "test" else None
                axes.plot(*zip(*points, strict=True), label=_LABELS[part], marker=marker, markersize=4, **style)
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(frameon=False)
    accuracy.set_ylim(bottom=0)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path)
    return None


_LABELS = {"train": "training batches, augmented", "test": "test images"}
