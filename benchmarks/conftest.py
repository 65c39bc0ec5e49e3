"""Options of the benchmarks, and their rows: printed as tables at the end, with --store or --output kept as JSON."""

from __future__ import annotations

import pathlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from benchmarks import reporting, timing
from fastcifar import native

_TABLES: dict[str, list[dict[str, Any]]] = defaultdict(list)


def pytest_addoption(parser: pytest.Parser) -> None:
    """--store, --output, --compile."""
    parser.addoption(
        "--store", action="store_true", help="keep the rows in benchmarks/results/DEVICE-torchVERSION.json"
    )
    parser.addoption("--output", type=pathlib.Path, metavar="FOLDER", help="keep that file in this folder instead")
    parser.addoption("--compile", action="store_true", help="torch.compile beside every operator")


@pytest.fixture(scope="session", autouse=True)
def allocator() -> bool:
    """The C library keeps freed memory for all alternatives alike, as in training."""
    return native.tune_allocator()


@pytest.fixture
def smoke(request: pytest.FixtureRequest) -> bool:
    """--benchmark-disable: everything runs once at tiny sizes, nothing is kept."""
    return request.config.getoption("benchmark_disable")


@pytest.fixture
def effort(smoke: bool) -> dict[str, Any]:
    """How long to measure: the options of `timing.in_turns`."""
    return {"rounds": 1, "warmup": 0} if smoke else {"rounds": 15, "budget": 2.0}


@pytest.fixture
def keep(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., None]:
    """keep(table, rows, rounds): rows for the table of that name, and the rounds of ours for pytest-benchmark.

    What is stored is stored at once, so that a run that is cut short leaves what it has.
    """

    def hand_over(table: str, rows: Sequence[dict[str, Any]], rounds: Sequence[float]) -> None:
        if benchmark.enabled:
            _TABLES[table] += rows
            folder = _folder(request.config)
            if folder is not None:
                reporting.store({table: _TABLES[table], "machine": [timing.machine()]}, folder)
        timing.hand_over(benchmark, rounds, rows=rows, **reporting.circumstances())

    return hand_over


def _folder(config: pytest.Config) -> pathlib.Path | None:
    """Where rows are kept. A stored table holds all its rows, so nothing is kept of a selection."""
    if config.getoption("keyword"):
        return None
    return config.getoption("output") or (reporting.RESULTS if config.getoption("--store") else None)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Prints the tables."""
    for name, rows in (_TABLES | ({"machine": [timing.machine()]} if _TABLES else {})).items():
        names = list(dict.fromkeys(key for row in rows for key in row))
        terminalreporter.section(name)
        terminalreporter.write_line(reporting.table([{key: row.get(key) for key in names} for row in rows]))
