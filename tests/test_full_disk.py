"""A disk that is full, read-only or limited: the run goes on with a warning; what is not saved at its end is said."""

import contextlib
import errno
import json
import os
import subprocess
import time

import pytest
from training_case import result_of, status_of, write_tiny

from fastcifar import command_line, train
from fastcifar.training import checkpoint, classify, loop, progress

RUN = ["--model-option", "width=0.05", "-b", "16", "--amp-dtype", "fp32", "--device", "cpu", "--steps", "12"]
RUN += ["--save-every", "2", "--eval-every", "0"]


@pytest.fixture
def source(tmp_path, monkeypatch, no_curves, one_thread):
    monkeypatch.chdir(tmp_path)
    return write_tiny(tmp_path / "tiny.npz")


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of one MiB."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"may not mount a file system here: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def fill(place):
    """Leaves not one block free."""
    with open(place / "ballast", "ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def before_step(monkeypatch, number, act):
    original = classify.Classification.train_step

    def train_step(self, step):
        if step == number:
            act()
        original(self, step)

    monkeypatch.setattr(classify.Classification, "train_step", train_step)


def test_a_full_disk_costs_the_last_checkpoints_only(source, small_disk, monkeypatch, capsys, record_property):
    assert status_of([*RUN, "--dataset", source, "--output", "whole"]) == 0
    whole = result_of(capsys)["state_sha256"]
    before_step(monkeypatch, 6, lambda: fill(small_disk))
    assert status_of([*RUN, "--dataset", source, "--output", small_disk / "run"]) == 4
    said = capsys.readouterr()
    warnings = [line for line in said.out.splitlines() if "WARNING: no checkpoint at step" in line]
    assert [line.split()[5] for line in warnings] == ["8", "10"] and "No space left" in warnings[0]
    assert "step 12/12" in said.out  # it went on to the end
    assert len(said.err.splitlines()) == 1 and "the last checkpoint could not be written" in said.err
    assert checkpoint.find(small_disk / "run", notify=pytest.fail).step == 6
    monkeypatch.undo()
    (small_disk / "ballast").unlink()
    assert status_of(["--resume", small_disk / "run"]) == 0
    result = result_of(capsys)
    assert result["state_sha256"] == whole and result["resumed_at"] == 6
    record_property("refused writes", len(warnings) + 1)


def test_metrics_that_did_not_fit_are_written_when_there_is_room(source, small_disk, monkeypatch, capsys):
    # At step 0 the file is empty: its first row needs a block.
    before_step(monkeypatch, 0, lambda: fill(small_disk))
    before_step(monkeypatch, 7, (small_disk / "ballast").unlink)
    assert status_of([*RUN, "--dataset", source, "--output", small_disk / "run", "--save-every", "0"]) == 0
    assert "WARNING: metrics cannot be written" in capsys.readouterr().out
    rows = [json.loads(line) for line in (small_disk / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert json.loads((small_disk / "run/result.json").read_text())["steps"] == 12


def _limited(arguments, log, step):
    """In a process of its own: from that step on no file may exceed 16 KiB, as a quota would have it."""
    import resource

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    with pytest.MonkeyPatch.context() as monkeypatch:
        before_step(monkeypatch, step, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, 2**14)))
        command_line.run("python -m fastcifar.train", train.main, arguments)


@pytest.mark.parametrize(("step", "last"), [(6, 6), (0, None)], ids=["after checkpoints", "from the beginning"])
def test_a_quota_is_a_full_disk_too(step, last, source, tmp_path, launcher):
    arguments = [str(part) for part in [*RUN, "--dataset", source, "--output", tmp_path / "run"]]
    log = tmp_path / "log"
    process = launcher.context.Process(target=_limited, args=(arguments, str(log), step))
    process.start()
    process.join(100)
    text = log.read_text()
    assert process.exitcode == 4, text
    assert "File too large" in text and "Traceback" not in text
    if last is None:
        assert not checkpoint.list_checkpoints(tmp_path / "run/checkpoints")
    else:
        assert checkpoint.find(tmp_path / "run", notify=pytest.fail).step == last


def test_a_result_that_cannot_be_written_is_printed_with_status_4(source, monkeypatch, capsys):
    def refuse(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(train, "draw_curves", refuse)
    assert status_of([*RUN, "--dataset", source, "--output", "run"]) == 4
    said = capsys.readouterr()
    assert "the result could not be written" in said.err and json.loads(said.out.splitlines()[-1])["steps"] == 12


def test_samples_that_cannot_be_written_are_a_warning(source, monkeypatch, capsys):
    def refuse(self, folder, step):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(classify.Classification, "write_samples", refuse)
    assert status_of([*RUN, "--dataset", source, "--output", "run"]) == 0
    assert "WARNING: no samples at step 12" in capsys.readouterr().out


def test_a_closed_pipe_does_not_end_a_run(monkeypatch):
    def broken(*arguments, **options):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    told = []
    monkeypatch.setattr("builtins.print", broken)
    progress.Lines(3, log=told.append).message("nobody listens")
    assert told == ["nobody listens"]


def test_a_read_only_folder_is_a_loud_error(source, request, tmp_path, capsys):
    if os.geteuid() == 0:  # whom permissions do not stop
        place = request.getfixturevalue("small_disk")
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    else:
        place = tmp_path / "locked"
        place.mkdir(mode=0o555)
    assert status_of([*RUN, "--dataset", source, "--output", place / "run"]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and str(place) in error
    assert "Read-only file system" in error or "Permission denied" in error
    assert not any(place.iterdir())


def test_a_stall_is_warned_of(source, monkeypatch, capsys):
    monkeypatch.setattr(loop, "STALL_SECONDS", 0.2)
    before_step(monkeypatch, 9, lambda: time.sleep(0.5))
    assert status_of([*RUN, "--dataset", source, "--output", "run"]) == 0
    assert capsys.readouterr().out.count("usual are") == 1
