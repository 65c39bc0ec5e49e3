"""`python -m benchmarks.kills --kills 30`: kills runs at random moments, again and again, and compares how they end.

Each run is killed by SIGKILL after a random time, started again with `--resume auto`, killed again, until it ends; then
a new one begins, until there were so many kills. What every run leaves must be what the undisturbed run leaves, to the
last bit of every tensor and every row of metrics. The processes are forked from one that has imported everything.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import pathlib
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch

from benchmarks import reporting
from fastcifar import command_line, train
from fastcifar.training import checkpoint

_COMMON = ["--deterministic", "--device", "cpu", "--amp-dtype", "fp32", "--resume", "auto", "--eval-every", "20"]
_GAN = ["--model-option", "latent_dim=4", "-b", "8", "--steps", "24", "--save-every", "2", "--model-ema-decay", "0.9"]
RUNS = {
    "classifier": [
        *["--model", "ds_resnet", "--model-option", "width=0.1", "--steps", "50", "--save-every", "3", "-b", "16"],
        *["--lr", "0.05", "--crop-pad", "2", "--mixup", "0.2", "--model-ema-decay", "0.9"],
    ],
    "dcgan": ["--model", "dcgan", "--model-option", "width=2", *_GAN],
    "aw_sngan": [
        *["--model", "aw_sngan", "--model-option", "width=2", "--model-option", "discriminator_width=2", *_GAN],
        *["--n-dis", "2", "--diffaugment", "translation,cutout"],
    ],
}
# What depends on the clock, or is read from the machine.
_TIMES = {"seconds", "images_per_second", "seconds_per_kimg", "memory_mib"}


@dataclass
class Found:
    """What the kills of one kind of run have shown; `problems` says in words what should not be."""

    kills: int = 0
    runs: int = 0
    inside_a_save: int = 0
    before_a_checkpoint: int = 0
    tensors: int = 0
    bytes_compared: int = 0
    bytes_lost: int = 0
    rows_compared: int = 0
    rows_lost: int = 0
    problems: list[str] = field(default_factory=list)


def write_images(path: pathlib.Path, size: int) -> None:
    """An .npz of 100 + 40 noisy images of four classes."""
    generator = numpy.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 100), ("test", 40)):
        labels = numpy.arange(count) % 4
        images = generator.integers(0, 120, (count, size, size, 3)) + 40 * (labels % 4)[:, None, None, None]
        arrays |= {f"{split}_images": images.astype(numpy.uint8), f"{split}_labels": labels}
    numpy.savez(path, **arrays)


def _enter(arguments: list[str], log: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    train.draw_curves = lambda *arguments: None  # which takes longer than the run
    command_line.run("python -m fastcifar.train", train.main, arguments)


class Launcher:
    """Starts command lines of `fastcifar.train` in processes that have everything imported."""

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["fastcifar.train", "torch._inductor"])
        warm_up = self.context.Process(target=int)
        warm_up.start()
        warm_up.join()

    def start(self, arguments: list[str], log: pathlib.Path) -> multiprocessing.process.BaseProcess:
        """A running process; its exit code is the command's status."""
        process = self.context.Process(target=_enter, args=(arguments, str(log)))
        process.start()
        return process


def _end(process: multiprocessing.process.BaseProcess, log: pathlib.Path) -> None:
    process.join(120)
    if process.exitcode != 0:
        raise RuntimeError(f"exit status {process.exitcode}:\n{log.read_text()[-2000:]}")


def kill_and_resume(
    launcher: Launcher, name: str, kills: int, folder: pathlib.Path, draw: random.Random, per_run: int = 12
) -> Found:
    """Kills runs of one kind until there were so many kills, each run `per_run` times at most.

    Raises:
        RuntimeError: a run that was not killed ended with an error.
    """
    size = 12 if name == "classifier" else 32
    write_images(folder / "images.npz", size)
    arguments = [*RUNS[name], *_COMMON, "--dataset", f"npz:{folder}/images.npz", "--output"]
    log = folder / "log"
    started = time.perf_counter()
    _end(launcher.start([*arguments, str(folder / "undisturbed")], log), log)
    duration = time.perf_counter() - started
    found = Found()
    while found.kills < kills:
        run = folder / f"run-{found.runs}"
        limit = min(per_run, kills - found.kills)
        for _ in range(limit):
            process = launcher.start([*arguments, str(run)], log)
            process.join(draw.uniform(0.0, duration))
            if process.exitcode is not None:
                break
            process.kill()
            process.join()
            found.kills += 1
            _look(run, found)
        _end(launcher.start([*arguments, str(run)], log), log)
        found.runs += 1
        _compare(folder / "undisturbed", run, found)
    return found


def _look(run: pathlib.Path, found: Found) -> None:
    """What a kill has left must be sound."""
    place = run / "checkpoints"
    if not checkpoint.list_checkpoints(place):
        found.before_a_checkpoint += 1
        return
    found.inside_a_save += any(place.glob(".tmp-*"))
    try:
        checkpoint.find(run, notify=found.problems.append)
    except checkpoint.CheckpointError as error:
        found.problems.append(str(error))


def _compare(expected: pathlib.Path, run: pathlib.Path, found: Found) -> None:
    """Adds what two finished runs differ in."""
    one, other = (checkpoint.find(path, notify=found.problems.append).tensors for path in (expected, run))
    if one.keys() != other.keys():
        found.problems.append(f"{run}: other tensors: {sorted(one.keys() ^ other.keys())}")
    for name in one.keys() & other.keys():
        a, b = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one[name], other[name]))
        found.tensors += 1
        found.bytes_compared += a.numel()
        found.bytes_lost += int((a != b).sum()) if a.shape == b.shape else a.numel()
    rows, others = (_rows(path) for path in (expected, run))
    found.rows_compared += len(rows)
    found.rows_lost += sum(row not in others for row in rows)
    steps = [row["step"] for row in others]
    if steps != sorted(set(steps)):
        found.problems.append(f"{run}: the steps of its metrics do not rise")
    if len((run / "metrics.csv").read_text().splitlines()) != len(rows) + 1:
        found.problems.append(f"{run}: metrics.csv has other rows than metrics.jsonl")


def _rows(run: pathlib.Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in _TIMES} for row in rows]


def main(arguments: Sequence[str] | None = None) -> int:
    """Kills, prints and stores; 1 if anything was lost."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kills", description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=30, help="of each kind of run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parsed = parser.parse_args(arguments)
    launcher, rows, problems = Launcher(), [], []
    for name in RUNS:
        with tempfile.TemporaryDirectory() as folder:
            found = kill_and_resume(launcher, name, parsed.kills, pathlib.Path(folder), random.Random(parsed.seed))
        facts = {key.replace("_", " "): value for key, value in vars(found).items() if key != "problems"}
        rows.append({"run": name, **facts, "problems": len(found.problems)})
        problems += found.problems
        print("\n".join(found.problems), end="", file=sys.stderr)
    print(reporting.table(rows))
    reporting.save("kills", {"rows": rows})
    return 1 if problems or any(row["bytes lost"] or row["rows lost"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
