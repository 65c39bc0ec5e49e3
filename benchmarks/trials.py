"""Alternatives of one training, each with several seeds: mean and standard deviation of the test accuracy."""

from __future__ import annotations

import contextlib
import json
import pathlib
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from fastcifar import train


def run(output: pathlib.Path, arguments: Sequence[str]) -> dict[str, Any]:
    """The result of `python -m fastcifar.train` with these arguments and --output; goes on where it was interrupted."""
    asked, note = json.dumps(list(arguments)), output / "arguments.json"
    if note.is_file() and note.read_text() != asked:
        raise SystemExit(f"{output} holds a run with other options; give another --folder")
    output.mkdir(parents=True, exist_ok=True)
    note.write_text(asked)
    if not (output / "result.json").is_file():
        with contextlib.redirect_stdout(sys.stderr):
            status = train.main([*arguments, "--output", str(output), "--resume", "auto"])
        if status:
            raise SystemExit(status)
    return json.loads((output / "result.json").read_text())


def compare(folder: pathlib.Path, alternatives: Mapping[str, Sequence[str]], seeds: int) -> list[dict[str, Any]]:
    """A row for each alternative: its test accuracies with seeds 0, 1, …, their mean and standard deviation."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in alternatives}
    for seed in range(seeds):
        for number, (name, arguments) in enumerate(alternatives.items()):
            found[name].append(run(folder / f"{number}-seed{seed}", [*arguments, "--seed", str(seed)]))
    rows = []
    for name, results in found.items():
        values = [result["test_accuracy"] for result in results]
        row = {"what": name, "test accuracy, %": statistics.mean(values)}
        row["standard deviation"] = statistics.stdev(values) if len(values) > 1 else None
        row["train accuracy, %"] = statistics.mean(result["train_accuracy"] for result in results)
        row["seconds"] = statistics.mean(result["seconds"] for result in results)
        row["runs"] = [{key: r[key] for key in ("seed", "test_accuracy", "state_sha256")} for r in results]
        rows.append(row)
    return rows


def printed(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows without what is too long for a table."""
    return [{name: value for name, value in row.items() if name != "runs"} for row in rows]
