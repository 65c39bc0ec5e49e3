"""Several processes end together: by a signal to one of them, by the death of one of them, by a full disk."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
from unittest import mock

import pytest
import torch
from distributed_case import run_ranks
from training_case import status_of, write_tiny

from fastcifar import train
from fastcifar.training import checkpoint, distributed

COMMON = ["--amp-dtype", "fp32", "--device", "cpu", "--steps", "9", "--save-every", "3", "-b", "8"]
SMALL_GAN = ["--model-option", "width=4", "--model-option", "discriminator_width=2"]
KINDS = {
    "classifier": [*COMMON, "--model-option", "width=0.25", "--lr", "0.05", "--eval-every", "0"],
    "aw_sngan": [*COMMON, "--model", "aw_sngan", *SMALL_GAN, "--eval-every", "0"],
}
TASKS = {"classifier": train.Classification, "aw_sngan": train.Adversarial}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("data") / "tiny.npz", size=32)


def before_step(kind, number, action):
    """Does something before the 0-based step."""
    original = TASKS[kind].train_step

    def train_step(self, step):
        if step == number:
            action()
        original(self, step)

    return mock.patch.object(TASKS[kind], "train_step", train_step)


@contextlib.contextmanager
def saves(steps):
    """Notes the step of each checkpoint that this process writes."""
    original = checkpoint.save

    def save(place, step, tensors, state):
        steps.append(step)
        return original(place, step, tensors, state)

    with mock.patch.object(checkpoint, "save", save):
        yield


def full_disk(*arguments):
    raise OSError(28, "No space left on device")


def lives(rank, world_size, kind, source, folder):
    """Exit statuses and saved steps of runs of all ranks that end in different ways."""
    found = {}

    def run(name, *arguments, output=None):
        steps = []
        with saves(steps):
            place = str(folder / (output or name))
            status = status_of([*KINDS[kind], "--dataset", source, "--output", place, *arguments])
        found[name] = status, steps

    def signalled(name, number, to):
        with before_step(kind, 4, lambda: rank == to and os.kill(os.getpid(), number)):
            run(name)

    names = {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    # The group outlives each run, for the next one.
    with mock.patch.dict(os.environ, names), mock.patch.object(distributed, "leave", lambda: None):
        run("whole")
        signalled("SIGTERM", signal.SIGTERM, to=1)
        run("resumed", "--resume", "auto", output="SIGTERM")
        if kind == "classifier":
            signalled("SIGINT", signal.SIGINT, to=0)
            signalled("SIGUSR1", signal.SIGUSR1, to=1)
            with mock.patch.object(checkpoint, "save", full_disk):
                run("full disk")
            run("another folder", "--resume", "auto", output=("SIGTERM", "nothing here")[rank])
    return found


@pytest.fixture(scope="module")
def ended(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return {kind: (folder / kind, run_ranks(lives, 2, kind, source, folder / kind)) for kind in KINDS}


def result(folder):
    return json.loads((folder / "result.json").read_text())


def rows(folder):
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    timed = ("images_per_second", "seconds", "seconds_per_kimg", "memory_mib")
    return [{name: value for name, value in row.items() if name not in timed} for row in lines]


@pytest.mark.parametrize("kind", KINDS)
def test_a_signal_to_one_rank_stops_all_after_the_same_step(kind, ended):
    folder, (first, second) = ended[kind]
    assert first["whole"] == (0, [3, 6, 9]) and second["whole"] == (0, [])
    # Sent before the fifth step; saved after it, once.
    assert first["SIGTERM"] == (128 + signal.SIGTERM, [3, 5]) and second["SIGTERM"] == (128 + signal.SIGTERM, [])


@pytest.mark.parametrize("kind", KINDS)
def test_going_on_after_a_signal_ends_at_the_same_hash_and_rows(kind, ended):
    folder, (first, second) = ended[kind]
    assert first["resumed"] == (0, [6, 9]) and second["resumed"] == (0, [])
    assert result(folder / "SIGTERM")["state_sha256"] == result(folder / "whole")["state_sha256"]
    assert rows(folder / "SIGTERM") == rows(folder / "whole")


@pytest.mark.parametrize("name", ["SIGINT", "SIGUSR1"])
def test_all_ranks_end_with_the_status_of_the_signal(name, ended):
    for rank in ended["classifier"][1]:
        assert rank[name][0] == 128 + getattr(signal, name)


def test_a_last_save_that_fails_ends_all_ranks_alike(ended):
    assert [rank["full disk"][0] for rank in ended["classifier"][1]] == [4, 4]


def test_ranks_that_would_begin_at_different_steps_are_refused(ended):
    assert [rank["another folder"][0] for rank in ended["classifier"][1]] == [2, 2]


def take_own(rank, world_size):
    processes, target = distributed.Processes(rank, world_size, rank), torch.full((2,), 9.0)
    gathered = processes.gather(torch.tensor([rank, 10.0 + rank]))
    found = [processes.take_own(target, gathered), target.tolist()]
    found += [processes.take_own(target, torch.ones(2)), target.tolist()]
    return found


def test_partial_sums_are_dropped_where_the_number_of_processes_has_changed():
    first, second = run_ranks(take_own, 2)
    assert first == [True, [0.0, 10.0], False, [0.0, 0.0]] and second == [True, [1.0, 11.0], False, [0.0, 0.0]]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "killed"), [("classifier", 1), ("aw_sngan", 0)])
def test_torchrun_restarts_a_killed_rank_and_ends_at_the_same_hash(kind, killed, source, ended, tmp_path):
    script = pathlib.Path(__file__).with_name("failing_rank.py")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "--max-restarts", "1", script, *KINDS[kind], "--dataset", source, "--resume", "auto"]
    environment = {**os.environ, "KILLED": str(killed), "OMP_NUM_THREADS": "1"}
    end = subprocess.run(
        [*command, "--output", tmp_path / "run"], env=environment, capture_output=True, text=True, timeout=240
    )
    assert end.returncode == 0, end.stderr
    found = json.loads(end.stdout.strip().splitlines()[-1])
    assert found["resumed_at"] == 3
    assert found["state_sha256"] == result(ended[kind][0] / "whole")["state_sha256"]
    assert rows(tmp_path / "run") == rows(ended[kind][0] / "whole")
