"""The picture of a run: what was measured over the steps."""

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
    figure = Figure(figsize=(10, 3.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = _GAN_PANELS if any("loss_d" in row for row in rows) else _PANELS
    panels = [panel for panel in panels if any(row.get(name) is not None for row in rows for name in panel[1])]
    for axes, (label, series) in zip(figure.subplots(1, max(len(panels), 1), squeeze=False)[0], panels, strict=False):
        for name, style in series.items():
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), markersize=4, **style)
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        if label == "accuracy, %" or label.startswith("Fréchet"):
            axes.set_ylim(bottom=0)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path)
    return None


_TRAIN = {"label": "training batches, augmented", "color": "tab:blue", "alpha": 0.8}
_TEST = {"label": "test images", "color": "tab:red", "marker": "o"}
_PANELS = [
    ("cross-entropy", {"train_loss": _TRAIN, "test_loss": _TEST}),
    ("accuracy, %", {"train_accuracy": _TRAIN, "test_accuracy": _TEST}),
]
_GAN_PANELS = [
    ("loss", {"loss_d": {"label": "discriminator"}, "loss_g": {"label": "generator"}}),
    ("mean logit", {"logit_real": {"label": "D(real)"}, "logit_fake": {"label": "D(fake)"}}),
    ("weight", {"weight_real": {"label": "w_r"}, "weight_fake": {"label": "w_f"}}),
    (
        "Fréchet distance to test images",
        {
            "fd": {"label": "classifier features", "color": "tab:red", "marker": "o"},
            "fid": {"label": "Inception features (FID)", "color": "tab:purple", "marker": "o"},
        },
    ),
]
