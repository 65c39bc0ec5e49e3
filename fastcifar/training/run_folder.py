"""The files of a run: configuration, environment, log, metrics, curves, result."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import pathlib
from collections.abc import Callable
from typing import Any

COLUMNS = (
    "step", "epoch", "learning_rate", "train_loss", "train_accuracy", "images_per_second", "seconds", "test_loss",
    "test_accuracy",
)  # fmt: skip


GAN_COLUMNS = (
    "step", "epoch", "learning_rate", "loss_d", "loss_g", "score_real", "score_fake", "weight_real", "weight_fake",
    "cosine", "logit_real", "logit_fake", "deviation", "images_per_second", "seconds", "kimg", "seconds_per_kimg",
    "memory_mib", "fd", "kid", "kid_deviation", "precision",
    "recall", "density", "coverage",
)  # fmt: skip


def new_folder(parent: pathlib.Path, name: str) -> pathlib.Path:
    """`parent/name`, or with -2, -3, … where that is taken; not made yet."""
    candidate, number = parent / name, 1
    while candidate.exists():
        number += 1
        candidate = parent / f"{name}-{number}"
    return candidate


def newest_folder(parent: pathlib.Path, name: str) -> pathlib.Path:
    """The last that `new_folder` gave for this name and that exists; `parent/name` when none does."""
    candidate, number = parent / name, 1
    while (parent / f"{name}-{number + 1}").exists():
        number += 1
        candidate = parent / f"{name}-{number}"
    return candidate


def write_json(path: pathlib.Path, content: Any) -> None:
    """Replaces a JSON file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)


class RunFolder:
    """Writes the files of one run.

    Args:
        path: the folder, made when missing.
        step: the step that the run goes on from; rows of later steps, which a killed run left, are dropped.
        columns: names that a row may hold.
    """

    def __init__(self, path: pathlib.Path, step: int = 0, columns: tuple[str, ...] = COLUMNS):
        self.path, self.columns = path, columns
        self.trackers: list[Callable[[dict[str, Any]], None]] = []
        path.mkdir(parents=True, exist_ok=True)
        self.rows = [row for row in _read_rows(path / "metrics.jsonl", columns) if row["step"] <= step]
        self._rewrite("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in self.rows))
        table = io.StringIO()
        writer = csv.DictWriter(table, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        self._rewrite("metrics.csv", table.getvalue())

    def _rewrite(self, name: str, text: str) -> None:
        temporary = self.path / f".{name}.tmp"
        temporary.write_text(text)
        os.replace(temporary, self.path / name)

    def describe(self, config: dict[str, Any], environment: dict[str, Any]) -> None:
        """Writes config.yaml (which `--config` reads) and env.json."""
        # JSON is YAML: the file can be written where PyYAML is missing.
        lines = [f"{key}: {json.dumps(value)}\n" for key, value in config.items() if value is not None]
        self._rewrite("config.yaml", "".join(lines))
        write_json(self.path / "env.json", environment)

    def add(self, row: dict[str, Any]) -> None:
        """Appends a row of metrics; its step must lie after the last one."""
        row = {key: _finite(value) for key, value in row.items()}
        self.rows.append(row)
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        with open(self.path / "metrics.csv", "a", newline="") as file:
            csv.DictWriter(file, self.columns, lineterminator="\n").writerow(row)
        for tracker in self.trackers:
            tracker(row)

    def log(self, line: str) -> None:
        """Appends a line to log.txt."""
        with open(self.path / "log.txt", "a") as file:
            file.write(line + "\n")


def _finite(value: Any) -> Any:
    """JSON has no NaN: such a value becomes null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _read_rows(path: pathlib.Path, columns: tuple[str, ...]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    if not path.is_file():
        return rows
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            break  # a kill cut the last line
        if isinstance(row, dict) and set(row) <= set(columns) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows
