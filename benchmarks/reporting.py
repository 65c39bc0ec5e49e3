"""What every measurement records: machine, versions, date, command; tables and JSON."""

from __future__ import annotations

import datetime
import json
import pathlib
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from benchmarks import timing
from fastcifar.training import environment

RESULTS = pathlib.Path(__file__).resolve().parent / "results"


def circumstances() -> dict[str, Any]:
    """Device, processor, versions, date and command."""
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        # Where things lay on this machine tells nobody anything.
        "command": " ".join(["python -m " + (__main__name() or sys.argv[0]), *map(last_part, sys.argv[1:])]),
        "processor": environment.processor_name(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
        facts["cuda"] = torch.version.cuda
    return facts


def last_part(word: Any) -> Any:
    """An absolute path by its last part (and npz:/… alike); anything else as it is."""
    if not isinstance(word, str) or "/" not in word:
        return word
    kind, colon, path = word.rpartition(":")
    return f"{kind}{colon}{pathlib.Path(path).name}" if path.startswith("/") else word


def __main__name() -> str | None:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name.removesuffix(".__main__") if spec else None


def interleaved(calls: Mapping[str, timing.Call], *, rounds: int, warmup: int = 2) -> dict[str, float]:
    """Median seconds of each call, in turns; device time on a GPU, with a warm L2 cache."""
    return timing.medians(timing.in_turns(calls, rounds=rounds, warmup=warmup, l2="warm"))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of equal keys as an aligned text table; numbers to the right."""
    names = list(rows[0])
    cells = [[_text(row[name]) for name in names] for row in rows]
    widths = [max(len(name), *(len(line[i]) for line in cells)) for i, name in enumerate(names)]
    right = [all(isinstance(row[name], (int, float)) or row[name] is None for row in rows) for name in names]

    def line(parts: Sequence[str]) -> str:
        aligned = (p.rjust(w) if r else p.ljust(w) for p, w, r in zip(parts, widths, right, strict=True))
        return "  ".join(aligned).rstrip()

    return "\n".join([line(names), line(["-" * width for width in widths]), *map(line, cells)])


def _text(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def save(name: str, content: Mapping[str, Any], folder: pathlib.Path | None = None) -> pathlib.Path:
    """Writes `name`.json with the circumstances into `benchmarks/results` or another folder; returns its path."""
    folder = RESULTS if folder is None else folder
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    facts = {"circumstances": circumstances(), **content}
    parts = [f"{json.dumps(key)}: {_lines(value)}" for key, value in facts.items()]
    path.write_text("{\n " + ",\n ".join(parts) + "\n}\n", encoding="utf-8")
    return path


def store(tables: Mapping[str, Sequence[Mapping[str, Any]]], folder: pathlib.Path = RESULTS) -> pathlib.Path:
    """Keeps tables, each with its circumstances, in the folder's file of this device and torch; returns its path.

    What that file holds under other names stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{device_name()}-torch{torch.__version__.split('+')[0]}.json"
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    kept |= {name: {"circumstances": circumstances(), "rows": rows} for name, rows in tables.items()}
    parts = [
        f'{json.dumps(name)}: {{"circumstances": {_lines(part["circumstances"])}, "rows": {_lines(part["rows"])}}}'
        for name, part in sorted(kept.items())
    ]
    path.write_text("{\n " + ",\n ".join(parts) + "\n}\n", encoding="utf-8")
    return path


def device_name() -> str:
    """The measured device as a file is named after it: "nvidia-h200", "amd-epyc-2cores"."""
    gpu = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if gpu else f"{environment.processor_name()} {torch.get_num_threads()}cores"
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-")


def _lines(value: Any) -> str:
    """JSON with a line for each row of a table, so that a changed row is a changed line."""
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], Mapping):
        return "[\n  " + ",\n  ".join(json.dumps(row, ensure_ascii=False) for row in value) + "\n ]"
    return json.dumps(value, ensure_ascii=False)
