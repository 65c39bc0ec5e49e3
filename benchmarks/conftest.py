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
    parser.addoption("--compile", action="store_true", help="torch.compile beside every operator also on a CPU")


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
    return {"rounds": 1, "warmup": 0} if smoke else {"rounds": 15, "budget": 3.0}


@pytest.fixture
def keep(benchmark: Any) -> Callable[..., None]:
    """keep(table, rows, rounds): rows for the table of that name, and the rounds of ours for pytest-benchmark."""

    def hand_over(table: str, rows: Sequence[dict[str, Any]], rounds: Sequence[float]) -> None:
        if benchmark.enabled:
            _TABLES[table] += rows
        timing.hand_over(benchmark, rounds, rows=rows, **reporting.circumstances())

    return hand_over


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Prints the tables and keeps them."""
    if not _TABLES:
        return
    _TABLES["machine"] = [timing.machine()]
    for name, rows in _TABLES.items():
        names = list(dict.fromkeys(key for row in rows for key in row))
        terminalreporter.section(name)
        terminalreporter.write_line(reporting.table([{key: row.get(key) for key in names} for row in rows]))
    folder = config.getoption("output") or (reporting.RESULTS if config.getoption("--store") else None)
    if folder is not None and config.getoption("keyword"):
        terminalreporter.write_line("nothing is kept of a run with -k: a stored table holds all its rows")
    elif folder is not None:
        terminalreporter.write_line(str(reporting.store(_TABLES, folder)))
