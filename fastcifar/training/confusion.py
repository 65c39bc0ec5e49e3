"""Which classes are taken for which."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import numpy


def confusion_matrix(labels: numpy.ndarray, predictions: numpy.ndarray, num_classes: int) -> numpy.ndarray:
    """Counts [num_classes, num_classes], int64: row = true class, column = predicted class."""
    pairs = labels.astype(numpy.int64) * num_classes + predictions.astype(numpy.int64)
    return numpy.bincount(pairs, minlength=num_classes * num_classes).reshape(num_classes, num_classes)


def accuracy_by_class(matrix: numpy.ndarray) -> list[float]:
    """Percent of each class's images that are recognised; NaN for a class without images."""
    totals = matrix.sum(1)
    with numpy.errstate(invalid="ignore", divide="ignore"):
        return (100.0 * numpy.diag(matrix) / totals).tolist()


def table(by_class: Sequence[float], names: Sequence[str], matrix: numpy.ndarray) -> str:
    """Accuracy by class, worst first, with the class it is most often taken for."""
    lines = [f"{'class':<20} {'accuracy':>9}   most often taken for"]
    errors = matrix.copy()
    numpy.fill_diagonal(errors, 0)
    for index in sorted(range(len(names)), key=lambda i: by_class[i]):
        other = int(errors[index].argmax())
        wrong = f"{names[other]} ({errors[index, other]})" if errors[index, other] else "–"
        lines.append(f"{names[index]:<20} {by_class[index]:>7.1f} %   {wrong}")
    return "\n".join(lines)


def draw(matrix: numpy.ndarray, names: Sequence[str], path: pathlib.Path, title: str) -> str | None:
    """Draws the matrix, rows in percent of their class; returns None, or why there is no picture."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        return f"no {path.name}: matplotlib cannot be imported ({error}); run `pip install matplotlib`"
    count = len(names)
    side = min(max(4.0, 0.17 * count), 24.0)
    figure = Figure(figsize=(side + 1.2, side), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    share = 100.0 * matrix / numpy.maximum(matrix.sum(1, keepdims=True), 1)
    image = axes.imshow(share, cmap="magma_r", vmin=0, vmax=100, interpolation="nearest")
    size = 8 if count <= 20 else 6
    axes.set_xticks(range(count), names, rotation=90, fontsize=size)
    axes.set_yticks(range(count), names, fontsize=size)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(title)
    if count <= 20:
        for row in range(count):
            for column in range(count):
                if matrix[row, column]:
                    ink = "white" if share[row, column] > 50 else "black"
                    axes.text(column, row, matrix[row, column], ha="center", va="center", fontsize=7, color=ink)
    figure.colorbar(image, ax=axes, label="% of the true class", shrink=0.6)
    figure.savefig(path)
    return None
