"""The table of promises names tests that exist, and figures that they record."""

import ast
import json
import pathlib

import pytest

from benchmarks import promises, reporting

TESTS = pathlib.Path(__file__).parent


@pytest.mark.parametrize("test", sorted({test for promise in promises.PROMISES for test in promise.tests}))
def test_every_named_test_exists(test):
    file, _, function = test.partition("::")
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert function in names if function else any(name.startswith("test_") for name in names)


def test_figures_are_the_sums_of_what_the_tests_recorded():
    case = {"test": "test_faults.py::test_any_call_may_fail", "outcome": "passed", "properties": {"faults": 20.0}}
    other = {**case, "test": "test_faults.py::test_something_else"}
    failed = {**case, "outcome": "failure", "properties": {}}
    row = promises.summary([case, case, other, failed])[2]
    assert row == {"promise": 3, "outcomes": {"passed": 2, "failure": 1}, "recorded": {"faults": 40.0}}
    kind = {"kills": 3, "runs": 2, "inside a save": 1, "bytes compared": 10, "bytes lost": 4}
    kind |= {"rows compared": 7, "rows lost": 0}
    found = promises.figures(row, {"rows": [kind, kind]}, {"format": 2})
    assert (found["faults"], found["tests"], found["kill_count"], found["bytes_lost"]) == ("40", 2, 6, 8)


def test_the_stored_results_are_of_these_promises_and_nothing_failed():
    stored = json.loads((reporting.RESULTS / "promises.json").read_text())
    assert [row["promise"] for row in stored["rows"]] == list(range(1, len(promises.PROMISES) + 1))
    assert all(row["outcomes"].get("passed") and not row["outcomes"].get("failure") for row in stored["rows"])
    assert all("{" not in row["figure"] for row in promises.rows())
