"""`python -m benchmarks.promises`: runs the test of every promise and stores what it found.

Figures come from the tests themselves, by pytest's `record_property`, and from `python -m benchmarks.kills`.
"""

from __future__ import annotations

import collections
import json
import pathlib
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as tree
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks import reporting

ROOT = reporting.RESULTS.parent.parent


@dataclass(frozen=True)
class Promise:
    """What is promised, the tests that try to break it (files, or FILE::FUNCTION), and its figure in words.

    The figure may name what the tests record, `tests`, and what `kills` holds, in braces.
    """

    text: str
    tests: tuple[str, ...]
    figure: str


_RESUME = "test_continuing_is_bit_exact"
PROMISES = (
    Promise(
        "A resumed run is the uninterrupted one, bit for bit: weights, statistics, averages, optimiser, metrics",
        (f"test_training.py::{_RESUME}", f"test_adversarial.py::{_RESUME}"),
        "{tests} recipes of classifiers and GANs",
    ),
    Promise(
        "So is one that was killed at random moments, again and again (SIGKILL, `--resume auto`)",
        ("test_kills.py",),
        "{kill_count} kills of {run_count} runs, {inside} inside a save: {bytes_lost} of {tensor_bytes} bytes lost",
    ),
    Promise(
        "A checkpoint is complete or absent",
        ("test_faults.py::test_any_call_may_fail", "test_faults.py::test_a_file_is_replaced_whole_or_not_at_all"),
        "{faults} failed calls, kills and power cuts, one at every call that writes: the last checkpoint loaded",
    ),
    Promise(
        "A full disk costs checkpoints, not the run; a last save that fails is exit status 4",
        ("test_full_disk.py",),
        "{tests} ways, among them a full file system of 1 MiB and a quota",
    ),
    Promise(
        "Damage is found, and the next older checkpoint used",
        ("test_faults.py::test_any_flipped_bit_is_found", "test_faults.py::test_any_truncation_is_found"),
        "{flips} flipped bits and {truncations} truncations: all found",
    ),
    Promise(
        "SIGTERM, SIGINT and SIGUSR1 save and end with 128 + signal, on all processes after the same step",
        (
            "test_interruption.py::test_a_signal_saves_and_the_rest_follows_exactly",
            "test_interruption.py::test_a_second_interrupt_stops_at_once",
            "test_elastic.py::test_a_signal_to_one_rank_stops_all_after_the_same_step",
            "test_elastic.py::test_all_ranks_end_with_the_status_of_the_signal",
        ),
        "{tests} cases",
    ),
    Promise(
        "`torchrun --max-restarts` with a killed process ends at the same hash; many processes train as one",
        (
            "test_elastic.py::test_torchrun_restarts_a_killed_rank_and_ends_at_the_same_hash",
            "test_training_ranks.py",
        ),
        "{tests} cases with 2 and 4 processes",
    ),
    Promise(
        "A loss or gradient that is not finite changes neither weights nor statistics (`--nan stop, skip, rollback`)",
        (
            "test_interruption.py::test_a_bad_step_changes_neither_weights_nor_statistics",
            "test_interruption.py::test_rollback_goes_back_with_half_the_rate",
            "test_interruption.py::test_rollback_gives_up",
            "test_interruption.py::test_a_resumed_run_remembers_its_rollbacks",
            "test_interruption.py::test_all_processes_go_back_together",
        ),
        "{tests} cases",
    ),
    Promise(
        "Out of memory: one line with the peak and a batch size that was tried; never another batch by itself",
        (
            "test_interruption.py::test_out_of_memory_names_the_peak_and_a_batch_size_that_was_tried",
            "test_interruption.py::test_nothing_fits",
            "test_interruption.py::test_memory_that_ends_outside_a_step_is_one_line_too",
        ),
        "{tests} cases",
    ),
    Promise(
        "Archives, pickles, weights and configurations from anywhere run nothing",
        ("test_data_security.py", "test_tensors.py", "test_fuzz.py::test_yaml_bombs"),
        "{tests} evil or damaged inputs, no canary",
    ),
    Promise(
        "Memory, objects, threads and files do not grow; nothing is compiled after the warm-up",
        ("test_long_runs.py",),
        "{steps} steps of three networks: {grown} MiB",
    ),
    Promise(
        "A wrong command line, configuration or checkpoint is one line of error and changes nothing",
        ("test_bad_commands.py", "test_fuzz.py"),
        "{bad_lines} command lines, {examples} fuzzed files",
    ),
    Promise(
        "Metrics survive: one row a step, in order, valid after every kill and a full disk",
        ("test_kills.py", "test_faults.py::test_metrics_outlive_a_full_disk"),
        "{rows} rows after {kill_count} kills: {rows_lost} lost",
    ),
    Promise(
        "Checkpoints of every format so far load; importing opens no connection",
        ("test_formats.py", "test_architecture.py::test_importing_takes_only_what_it_needs"),
        "{tests} cases, formats 1 to {format}",
    ),
    Promise(
        "An exported program (ONNX, torch.export) computes what the network does, or is refused",
        (
            "test_export.py::test_a_classifier",
            "test_export.py::test_a_generator",
            "test_export.py::test_a_program_that_differs_is_refused",
        ),
        "{tests} cases, {inputs} inputs",
    ),
)


def run_tests(report: pathlib.Path) -> list[dict[str, Any]]:
    """Runs the files of all promises; each test's file, function, outcome and recorded properties."""
    files = sorted({f"tests/{test.partition('::')[0]}" for promise in PROMISES for test in promise.tests})
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "junit_family=xunit1"]
    command += [f"--junitxml={report}", *files]
    subprocess.run(command, cwd=ROOT, check=False, stdin=subprocess.DEVNULL)
    found = []
    for case in tree.parse(report).getroot().iter("testcase"):
        outcome = next((kind for kind in ("failure", "error", "skipped") if case.find(kind) is not None), "passed")
        properties: collections.Counter[str] = collections.Counter()
        for recorded in case.iter("property"):
            properties[recorded.get("name")] += float(recorded.get("value"))
        name = f"{case.get('classname', '').rpartition('.')[2]}.py::{case.get('name', '').partition('[')[0]}"
        found.append({"test": name, "outcome": outcome, "properties": dict(properties)})
    return found


def summary(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each promise: its outcomes, and the sums of what its tests recorded."""
    rows = []
    for number, promise in enumerate(PROMISES, 1):
        mine = [c for c in cases if any(c["test"] == t or c["test"].startswith(t + "::") for t in promise.tests)]
        outcomes = collections.Counter(case["outcome"] for case in mine)
        sums: collections.Counter[str] = collections.Counter()
        for case in mine:
            sums.update(case["properties"])
        rows.append({"promise": number, "outcomes": dict(outcomes), "recorded": dict(sums)})
    return rows


def figures(row: Mapping[str, Any], kills: Mapping[str, Any], cases: Mapping[str, int]) -> dict[str, Any]:
    """What a promise's figure may name."""
    killed = kills["rows"]
    recorded = {name.replace(" ", "_"): f"{round(value):,}" for name, value in row["recorded"].items()}
    return {
        **recorded,
        "tests": row["outcomes"].get("passed", 0),
        "grown": round(row["recorded"].get("MiB grown", 0.0), 1),
        "kill_count": sum(kind["kills"] for kind in killed),
        "run_count": sum(kind["runs"] for kind in killed),
        "inside": sum(kind["inside a save"] for kind in killed),
        "bytes_lost": sum(kind["bytes lost"] for kind in killed),
        "tensor_bytes": f"{sum(kind['bytes compared'] for kind in killed):,}",
        "rows": f"{sum(kind['rows compared'] for kind in killed):,}",
        "rows_lost": sum(kind["rows lost"] for kind in killed),
        **cases,
    }


def rows() -> list[dict[str, str]]:
    """The table, from the stored results."""
    found, kills = (json.loads((reporting.RESULTS / f"{name}.json").read_text()) for name in ("promises", "kills"))
    lines = []
    for promise, row in zip(PROMISES, found["rows"], strict=True):
        names = sorted({test.partition("::")[0].removesuffix(".py") for test in promise.tests})
        lines.append(
            {
                "promise": promise.text,
                "test": ", ".join(f"`{name}`" for name in names),
                "figure": promise.figure.format(**figures(row, kills, found["counts"])),
            }
        )
    return lines


def main() -> int:
    """Runs, prints and stores; 1 if a test failed."""
    with tempfile.TemporaryDirectory() as folder:
        cases = run_tests(pathlib.Path(folder) / "report.xml")
    from fastcifar.training import checkpoint

    bad_lines = sum(case["test"] == "test_bad_commands.py::test_a_wrong_command_line" for case in cases)
    examples = sum(int(case["properties"].get("examples", 0)) for case in cases)
    table = summary(cases)
    counts = {"bad_lines": bad_lines, "examples": examples, "format": checkpoint.FORMAT}
    reporting.save("promises", {"counts": counts, "rows": table})
    failed = [case["test"] for case in cases if case["outcome"] in ("failure", "error")]
    print(reporting.table([{"promise": row["promise"], **row["outcomes"]} for row in table]) if not failed else failed)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
