"""The files of a run: configuration, environment, log, metrics, curves, result.

Once the run goes on, none of them ends it: what a full disk refuses is warned of and written later.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from fastcifar.training import durable

COLUMNS = (
    "step", "epoch", "learning_rate", "train_loss", "train_accuracy", "images_per_second", "seconds", "test_loss",
    "test_accuracy",
)  # fmt: skip


GAN_COLUMNS = (
    "step", "epoch", "learning_rate", "loss_d", "loss_g", "score_real", "score_fake", "weight_real", "weight_fake",
    "cosine", "logit_real", "logit_fake", "deviation", "images_per_second", "seconds", "kimg", "seconds_per_kimg",
    "memory_mib", "fd", "fid", "kid", "kid_deviation", "precision", "recall", "density", "coverage",
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
    durable.replace(path, (json.dumps(content, indent=1) + "\n").encode())


class RunFolder:
    """Writes the files of one run.

    Args:
        path: the folder, made when missing.
        step: the step that the run goes on from; rows of later steps, which a killed run left, are dropped. None:
            `rewind` will say.
        columns: names that a row may hold.

    Raises:
        ValueError: another process has it.
        OSError: it cannot be written.
    """

    def __init__(self, path: pathlib.Path, step: int | None = 0, columns: tuple[str, ...] = COLUMNS):
        self.path, self.columns = path, columns
        self.trackers: list[Callable[[dict[str, Any]], None]] = []
        self.problem: str | None = None
        self.lost_tracker: str | None = None
        durable.make_folder(path)
        self._claim = claim(path)
        self.rows = _read_rows(path / "metrics.jsonl", columns)
        if step is not None:
            self.rewind(step)

    def close(self) -> None:
        """Leaves the folder to other processes."""
        if self._claim is not None:
            os.close(self._claim)
            self._claim = None

    def rewind(self, step: int) -> None:
        """Drops the rows after a step and writes the rest anew.

        Raises:
            OSError: as the system says; the old files are untouched.
        """
        self.rows = [row for row in self.rows if row["step"] <= step]
        self._write_rows()

    def _write_rows(self) -> None:
        lines = "".join(json.dumps(row) + "\n" for row in self.rows)
        durable.replace(self.path / "metrics.jsonl", lines.encode())
        table = io.StringIO()
        writer = csv.DictWriter(table, self.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        durable.replace(self.path / "metrics.csv", table.getvalue().encode())

    def describe(self, config: dict[str, Any], environment: dict[str, Any]) -> None:
        """Writes config.yaml (which `--config` reads) and env.json."""
        # JSON is YAML: the file can be written where PyYAML is missing.
        lines = [f"{key}: {json.dumps(value)}\n" for key, value in config.items() if value is not None]
        durable.replace(self.path / "config.yaml", "".join(lines).encode())
        write_json(self.path / "env.json", environment)

    def add(self, row: dict[str, Any]) -> None:
        """Appends a row of metrics; its step must lie after the last one.

        Where the files cannot be written, `problem` says why until they can be; the rows wait in memory for that.
        """
        row = {key: _finite(value) for key, value in row.items()}
        self.rows.append(row)
        try:
            if self.problem is None:
                self._append(row)
            else:  # the files may end in half a row
                self._write_rows()
            self.problem = None
        except OSError as error:
            self.problem = str(error)
        for tracker in list(self.trackers):
            try:
                tracker(row)
            except Exception as error:  # a service of others must not end the run
                self.trackers.remove(tracker)
                self.lost_tracker = f"{type(error).__name__}: {error}"

    def _append(self, row: dict[str, Any]) -> None:
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        with open(self.path / "metrics.csv", "a", newline="") as file:
            csv.DictWriter(file, self.columns, lineterminator="\n").writerow(row)

    def flush(self) -> None:
        """Flushes the metrics to the disk, where they can be written."""
        with contextlib.suppress(OSError):
            durable.flush(self.path / "metrics.jsonl")
            durable.flush(self.path / "metrics.csv")

    def log(self, line: str) -> None:
        """Appends a line to log.txt, where it can be written."""
        with contextlib.suppress(OSError), open(self.path / "log.txt", "a") as file:
            file.write(line + "\n")


@contextlib.contextmanager
def claimed(path: pathlib.Path) -> Iterator[None]:
    """Makes the folder and keeps other processes out of it.

    Raises:
        ValueError: another process has it.
        OSError: it cannot be made.
    """
    durable.make_folder(path)
    descriptor = claim(path)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def claim(path: pathlib.Path) -> int | None:
    """A descriptor that keeps other processes out of a folder as long as it is open; None where the system has no such
    locks.

    Raises:
        ValueError: another process has it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(f"another process is training in {path}; wait for it, or choose another --output") from None
    except OSError:  # some network file systems have none
        os.close(descriptor)
        return None
    return descriptor


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
