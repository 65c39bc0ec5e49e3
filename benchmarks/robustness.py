"""`python -m benchmarks.robustness RUN…`: accuracy of runs on clean images and under PGD-20, side by side, stored.

20 steps of 2/255 within 8/255 from a random start, float32, on the first images of the test set; the table goes to
results/robustness.json with the options that the runs were trained by.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks import reporting
from fastcifar.training import evaluation, robustness, trained


def measure(run: str, count: int) -> dict[str, Any]:
    """A row: how the run was trained, and its accuracies in percent; the clean one on all test images."""
    model, recipe, dataset, saved = trained.load_classifier(run)
    device = torch.device("cpu")
    clean = evaluation.evaluate_split(model, dataset, "test", device=device, amp_dtype=torch.float32)
    attacked = robustness.robust_evaluation(model, dataset, "test", device=device, count=count)
    kind = recipe.adversarial
    return {
        "network": recipe.model,
        "trained": "on clean images" if kind == "off" else f"{kind}, {recipe.adversarial_steps} steps of the attack",
        "steps": f"{saved.step} × {recipe.batch_size}",
        "from other weights": recipe.init_weights is not None,
        "accuracy, %": round(clean.accuracy, 2),
        f"under PGD-20, first {count} images, %": round(attacked.accuracy, 2),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and stores; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.robustness", description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="+", help="run folders")
    parser.add_argument("--images", type=int, default=1000, help="under attack; default: 1000")
    parsed = parser.parse_args(arguments)
    rows = [measure(run, parsed.images) for run in parsed.runs]
    print(reporting.table(rows))
    print(reporting.save("robustness", {"rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
