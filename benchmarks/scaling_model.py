"""Step time against the number of processes: latency and bandwidth of every collective, and the arithmetic between.

No overlap is assumed: a step is its arithmetic plus each of its collectives, one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy


class Network(Protocol):
    """What a collective costs."""

    def seconds(self, kind: str, size: float, processes: int) -> float:
        """Of one call into which each process puts `size` bytes."""


def ring(kind: str, size: float, processes: int) -> tuple[int, float]:
    """Hops one after the other, and the bytes that each process sends, of a collective around a ring."""
    n = processes
    if kind == "all_reduce":
        return 2 * (n - 1), 2 * (n - 1) / n * size
    if kind == "all_gather":
        return n - 1, (n - 1) * size
    if kind == "all_to_all":
        return n - 1, (n - 1) / n * size
    raise ValueError(f"no model of {kind!r}")


@dataclass(frozen=True)
class Ring:
    """Gloo: base + α·hops + β·bytes sent, in seconds; all links alike."""

    base: float
    alpha: float
    beta: float

    def seconds(self, kind: str, size: float, processes: int) -> float:
        """As in `Network`."""
        if processes == 1:
            return 0.0
        hops, sent = ring(kind, size, processes)
        return self.base + self.alpha * hops + self.beta * sent


def fit_ring(rows: Iterable[Mapping[str, Any]]) -> Ring:
    """Least squares of the relative errors over rows of kind, bytes, processes and seconds; nothing below zero."""
    rows = list(rows)
    terms = numpy.array([[1.0, *ring(r["kind"], r["bytes"], r["processes"])] for r in rows])
    seconds = numpy.array([r["seconds"] for r in rows])
    chosen = list(range(3))
    while True:
        values, *_ = numpy.linalg.lstsq(terms[:, chosen] / seconds[:, None], numpy.ones(len(rows)), rcond=None)
        if (values >= 0).all() or len(chosen) == 1:
            break
        chosen.remove(chosen[int(values.argmin())])
    found = dict(zip(chosen, values.tolist(), strict=True))
    return Ring(*(max(found.get(i, 0.0), 0.0) for i in range(3)))


@dataclass(frozen=True)
class Latencies:
    """Microseconds before anything moves, for a hop within and between machines, and the share of the bandwidth."""

    tree: tuple[float, float, float]
    ring: tuple[float, float, float]
    share: float


@dataclass(frozen=True)
class Nccl:
    """GPUs in machines, by NCCL's own cost model: the quickest of its protocols, trees and rings.

    Source: NVIDIA/nccl, src/graph/tuning.cc (commit b647562): baseLat, hwLat and the latency formulas, whose constants
    stand below; the overhead of a network post is that of Intel processors. Bandwidths, in bytes a second and
    direction: 370 GB/s of NVLink 4 (NVIDIA/nccl-tests issue 212), 48 GB/s of a 400 Gb/s adapter for each GPU (issue
    290).
    """

    gpus_per_machine: int = 8
    within: float = 370e9
    between: float = 48e9

    protocols = (
        Latencies(tree=(6.8, 0.6, 5.0), ring=(6.6, 0.6, 2.7), share=1 / 4),  # LL
        Latencies(tree=(14.0, 1.25, 8.5), ring=(14.0, 1.9, 4.0), share=120 / 128),  # LL128
    )
    post_overhead = 1.0

    def seconds(self, kind: str, size: float, processes: int) -> float:
        """As in `Network`."""
        if processes == 1:
            return 0.0
        machines = math.ceil(processes / self.gpus_per_machine)
        sent = ring(kind, size, processes)[1]
        rate = self.within if machines == 1 else self.between
        times = []
        for protocol in self.protocols:
            latencies = [self._ring(protocol, kind, processes, machines)]
            if kind == "all_reduce":
                latencies.append(self._tree(protocol, processes, machines))
            times += [1e-6 * latency + sent / (rate * protocol.share) for latency in latencies]
        return min(times)

    def _tree(self, protocol: Latencies, processes: int, machines: int) -> float:
        base, intra, inter = protocol.tree
        return base + 2 * ((processes / machines - 1) * intra + int(math.log2(machines)) * inter)

    def _ring(self, protocol: Latencies, kind: str, processes: int, machines: int) -> float:
        base, intra, inter = protocol.ring
        hops = ring(kind, 0, processes)[0]
        between = 0 if machines == 1 else 2 * machines if kind == "all_reduce" else machines - 1
        if machines > 1:
            intra = max(intra, self.post_overhead)
        return base + (hops - between) * intra + between * inter


def exchange_seconds(collectives: Iterable[Mapping[str, Any]], network: Network, processes: int) -> float:
    """All collectives of a step: rows of kind, bytes (of one call) and calls."""
    return sum(row["calls"] * network.seconds(row["kind"], row["bytes"], processes) for row in collectives)


@dataclass(frozen=True)
class Arithmetic:
    """Seconds of a step's arithmetic on one GPU: what does not shrink with the batch, and that of an image.

    Assumed, not measured: 0.65 ms for 512 images is this project's goal for ds_resnet on an H200, of which 0.25 ms are
    taken to be some 100 kernels of a captured graph, each at least 2.5 µs.
    """

    fixed: float = 0.25e-3
    image: float = 0.40e-3 / 512

    def seconds(self, images: float) -> float:
        """Of a batch of so many."""
        return self.fixed + self.image * images


def on_gpu(collectives: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The collectives as a GPU has them: batch statistics travel in float32 there."""
    return [{**row, "bytes": row["bytes"] / 2 if row["dtype"] == "float64" else row["bytes"]} for row in collectives]


def efficiency(arithmetic: float, exchange: float, alone: float) -> float:
    """Percent of what as many GPUs would do that need not exchange anything, to three digits."""
    return float(f"{100 * alone / (arithmetic + exchange):.3g}")


def projection(
    volumes: Sequence[Mapping[str, Any]], counts: Sequence[int], *, images: int, each: bool
) -> list[dict[str, Any]]:
    """Rows for ds_resnet on so many GPUs, with `images` in a step on each of them or (`each=False`) on all together.

    The efficiency is against one GPU with those images.
    """
    network, arithmetic, rows = Nccl(), Arithmetic(), []
    for count in counts:
        compute = arithmetic.seconds(images if each else images / count)
        row: dict[str, Any] = {"GPUs": count, "images on each": images if each else images // count}
        row["arithmetic, ms"] = 1e3 * compute
        alone = arithmetic.seconds(images) / (1 if each else count)
        for name, task in (("synchronised", "ds_resnet"), ("local", "ds_resnet, local statistics")):
            exchange = exchange_seconds(on_gpu(_of(task, volumes)), network, count)
            row |= {f"{name}: exchange, ms": 1e3 * exchange}
            row |= {f"{name}: efficiency, %": efficiency(compute, exchange, alone)}
        rows.append(row)
    return rows


def _of(task: str, volumes: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [row for row in volumes if row["task"] == task]


def remedies(volumes: Sequence[Mapping[str, Any]], counts: Sequence[int], images: int = 512) -> list[dict[str, Any]]:
    """Rows of what the exchange of a step costs, and what is left of the GPUs, with one remedy or another."""
    network, arithmetic = Nccl(), Arithmetic()
    synchronised = on_gpu(_of("ds_resnet", volumes))
    local = on_gpu(_of("ds_resnet, local statistics", volumes))
    gradients = [row for row in synchronised if row["dtype"] == "float32"]
    statistics = [row for row in synchronised if row["dtype"] == "float64"]

    def seconds(collectives: Sequence[Mapping[str, Any]], count: int) -> float:
        return exchange_seconds(collectives, network, count)

    def as_table(count: int) -> list[dict[str, Any]]:
        gathers = [row for row in statistics if row["kind"] == "all_gather"]
        summed = [{**row, "kind": "all_reduce", "bytes": count * row["bytes"]} for row in gathers]
        return [*gradients, *(row for row in statistics if row["kind"] == "all_reduce"), *summed]

    cases = {
        "statistics of all GPUs": (1, 1, lambda count: seconds(synchronised, count)),
        "the same, gathered by an all-reduce (not built)": (1, 1, lambda count: seconds(as_table(count), count)),
        "statistics of each machine (not built)": (
            1, 1, lambda count: seconds(statistics, min(count, 8)) + seconds(gradients, count),
        ),
        "local statistics": (1, 1, lambda count: seconds(local, count)),
        "local, four batches to an update (not built)": (1, 4, lambda count: seconds(local, count)),
        "local, four times the batch": (4, 1, lambda count: seconds(local, count)),
    }  # fmt: skip
    rows = []
    for name, (larger, batches, exchange) in cases.items():
        row: dict[str, Any] = {"remedy": name, "images on each": larger * images, "batches": batches}
        compute = batches * arithmetic.seconds(larger * images)
        for count in counts:
            row[f"{count} GPUs: exchange, ms"] = 1e3 * exchange(count)
            row[f"{count} GPUs: efficiency, %"] = efficiency(compute, exchange(count), compute)
        rows.append(row)
    return rows
