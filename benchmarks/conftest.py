"""Rows of figures beside pytest-benchmark's own: printed as tables at the end, with --store kept as JSON."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch

from benchmarks import reporting

_TABLES: dict[str, list[dict[str, Any]]] = defaultdict(list)


def pytest_addoption(parser: pytest.Parser) -> None:
    """--store."""
    parser.addoption("--store", action="store_true", help="keep the tables in benchmarks/results/NAME-DEVICE.json")


@pytest.fixture
def add_row():
    """add_row(name, **values): a row of the table of that name; seconds as "…, ms"."""

    def add(name: str, **values: Any) -> None:
        _TABLES[name].append(values)

    return add


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Prints the tables and keeps them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, rows in _TABLES.items():
        names = list(dict.fromkeys(key for row in rows for key in row))
        terminalreporter.section(name)
        terminalreporter.write_line(reporting.table([{key: row.get(key) for key in names} for row in rows]))
        if config.getoption("--store"):
            terminalreporter.write_line(str(reporting.save(f"{name}-{device}", {"rows": rows})))
