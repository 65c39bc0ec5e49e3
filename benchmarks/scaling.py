"""`python -m benchmarks.scaling`: what data-parallel training exchanges and how long its steps take, on this machine.

Counts the collectives of a step and their bytes; times steps in 1, 2 and 4 gloo processes of one thread each, in turns;
fits latency and bandwidth to collectives timed alone and compares the model of `benchmarks.scaling_model` with the
measured steps. Writes results/scaling-cpu.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import os
import pathlib
import socket
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks import reporting
from benchmarks.scaling_model import Ring, exchange_seconds, fit_ring
from benchmarks.scaling_worker import TASKS, serve

WORLDS = (1, 2, 4)
TIMED = ("ds_resnet", "ds_resnet, local statistics", "aw_sngan")
LOCAL, GLOBAL = 32, 64
SIZES = (256, 4096, 65_536, 524_288, 4_194_304)


class Group:
    """Processes that train together and obey this one."""

    def __init__(self, world_size: int):
        self.world_size = world_size
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(world_size):
            pipe, other = context.Pipe()
            self.pipes.append(pipe)
            self.processes.append(context.Process(target=serve, args=(other, rank, world_size, port), daemon=True))
            self.processes[-1].start()

    def ask(self, name: str, *arguments: Any) -> list[Any]:
        """The answers of all processes to a command that all get at once."""
        for pipe in self.pipes:
            pipe.send((name, arguments))
        return [pipe.recv() for pipe in self.pipes]

    def close(self) -> None:
        """Ends the processes."""
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(timeout=10)


def cases() -> list[tuple[str, int, int]]:
    """Task, processes, images of each: a fixed local batch and a fixed global one."""
    return [(task, count, images) for task in TIMED for count in WORLDS for images in sorted({LOCAL, GLOBAL // count})]


def volume(group: Group) -> list[dict[str, Any]]:
    """Rows of task, kind, dtype, bytes of a call, calls; of one process in a step."""
    return [{"task": task, **row} for task in TASKS for row in group.ask("count", task, LOCAL)[0]]


def time_all(groups: dict[int, Group], rounds: int, steps: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of steps and of collectives: medians over rounds in which all take turns."""
    step_times: dict[tuple, list[float]] = {}
    collective_times: dict[tuple, list[float]] = {}
    for number in range(rounds + 1):
        for case in cases():
            task, count, images = case
            for together in (False, True) if count > 1 else (False,):
                # A step ends when the last process has ended it.
                seconds = max(groups[count].ask("steps", task, images, together, steps))
                if number:
                    step_times.setdefault((*case, together), []).append(seconds)
        for count in WORLDS[1:]:
            for kind in ("all_reduce", "all_gather"):
                for size in SIZES:
                    seconds = max(groups[count].ask("collective", kind, size, 20))
                    if number:
                        collective_times.setdefault((kind, count, size), []).append(seconds)
    found = [
        {"task": task, "processes": count, "images": images, "together": together, "seconds": statistics.median(times)}
        for (task, count, images, together), times in step_times.items()
    ]
    timed = [
        {"kind": kind, "processes": count, "bytes": size, "seconds": statistics.median(times)}
        for (kind, count, size), times in collective_times.items()
    ]
    return found, timed


def fit_all(collectives: Sequence[dict[str, Any]]) -> dict[int, Ring]:
    """A network for each number of processes: more of them than cores wait for a core at every hop."""
    fitted = {n: fit_ring(r for r in collectives if r["processes"] == n) for n in {r["processes"] for r in collectives}}
    return {1: Ring(0.0, 0.0, 0.0), **fitted}


def check(
    steps: Sequence[dict[str, Any]], collectives: Sequence[dict[str, Any]], volumes: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The model beside each measured step: the same processes' arithmetic without exchange, and their collectives."""
    networks = fit_all(collectives)
    alone = {(r["task"], r["processes"], r["images"]): r["seconds"] for r in steps if not r["together"]}
    rows = []
    for row in steps:
        case = row["task"], row["processes"], row["images"]
        if row["together"] or row["processes"] == 1:
            exchanged = [r for r in volumes if r["task"] == row["task"]]
            exchange = exchange_seconds(exchanged, networks[row["processes"]], row["processes"])
            predicted = alone[case] + exchange
            rows.append(
                {
                    "task": row["task"],
                    "processes": row["processes"],
                    "images each": row["images"],
                    "arithmetic, ms": 1e3 * alone[case],
                    "exchange by the model, ms": 1e3 * exchange,
                    "model, ms": 1e3 * predicted,
                    "measured, ms": 1e3 * row["seconds"],
                    "model's error, %": round(100 * (predicted / row["seconds"] - 1), 1),
                }
            )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints, and writes the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4, help="timed steps of each case in a round")
    parser.add_argument("--output", type=pathlib.Path, help="folder of the result; default: benchmarks/results")
    options = parser.parse_args(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"
    groups = {count: Group(count) for count in WORLDS}
    try:
        volumes = volume(groups[2])
        steps, collectives = time_all(groups, options.rounds, options.steps)
    finally:
        for group in groups.values():
            group.close()
    networks = fit_all(collectives)
    for row in collectives:
        row["model"] = networks[row["processes"]].seconds(row["kind"], row["bytes"], row["processes"])
    gloo = [{"processes": count, **dataclasses.asdict(networks[count])} for count in WORLDS[1:]]
    checked = check(steps, collectives, volumes)
    print(*map(reporting.table, (volumes, collectives, gloo, checked)), sep="\n\n")
    content = {
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "gloo": gloo,
        "volume": volumes,
        "collectives": collectives,
        "steps": steps,
        "check": checked,
    }
    print(reporting.save("scaling-cpu", content, options.output))


if __name__ == "__main__":
    main()
