"""Tables in Markdown of `python -m benchmarks.scaling` and of its model, for docs/scaling.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import scaling_model
from benchmarks.tables import markdown, source, stored

GPUS = (1, 2, 4, 8, 16, 64, 256, 1024)


def scaling_volume_table() -> str:
    """What the processes exchange in a step."""
    found = stored("scaling-cpu")
    rows: dict[str, dict[str, Any]] = {}
    for row in found["volume"]:
        line = rows.setdefault(
            row["task"], {"a step of": row["task"], "all-gather": 0, "all-reduce": 0, "all-to-all": 0}
        )
        line[row["kind"].replace("_", "-")] += row["calls"]
        line["bytes"] = line.get("bytes", 0) + row["calls"] * row["bytes"]
    largest = {task: max(r["bytes"] for r in found["volume"] if r["task"] == task) for task in rows}
    lines = [{**row, "of these the largest call": largest[task]} for task, row in rows.items()]
    return f"{markdown(lines)}\nCalls, and the bytes that each process puts into them.\n{source('scaling-cpu')}"


def scaling_check_table() -> str:
    """The model beside measured steps."""
    found = stored("scaling-cpu")
    fits = "; ".join(
        f"{row['processes']} processes: {1e6 * row['base']:.0f} µs a call, {1e6 * row['alpha']:.0f} µs a hop, "
        f"{1e9 * row['beta']:.2f} ns a byte"
        for row in found["gloo"]
    )
    names = ("kind", "processes", "bytes")
    timed = [
        {**{name: row[name] for name in names}, "measured, µs": 1e6 * row["seconds"], "model, µs": 1e6 * row["model"]}
        for row in found["collectives"]
    ]
    text = (
        f"Fitted to these: {fits}. One thread for each process, {found['cores']} cores; load of the machine at the end "
        f"{found['load_average']:.1f}."
    )
    return f"{markdown(timed)}\n{text}\n\n{markdown(found['check'])}{source('scaling-cpu')}"


def _projected(rows: Sequence[Mapping[str, Any]]) -> str:
    return (
        f"{markdown(rows)}\nA model, not a measurement: collectives counted in `benchmarks/results/scaling-cpu.json`.\n"
    )


def scaling_each_table() -> str:
    """A model of up to 1,024 GPUs, with the same batch on each."""
    volumes = stored("scaling-cpu")["volume"]
    return _projected(scaling_model.projection(volumes, GPUS, images=512, each=True))


def scaling_all_table() -> str:
    """A model of up to 1,024 GPUs that share one batch."""
    volumes = stored("scaling-cpu")["volume"]
    return _projected(scaling_model.projection(volumes, GPUS, images=8192, each=False))


def scaling_remedies_table() -> str:
    """A model of what helps."""
    return _projected(scaling_model.remedies(stored("scaling-cpu")["volume"], (8, 64, 1024)))


TABLES = {
    "scaling-volume": scaling_volume_table,
    "scaling-check": scaling_check_table,
    "scaling-each": scaling_each_table,
    "scaling-all": scaling_all_table,
    "scaling-remedies": scaling_remedies_table,
}
