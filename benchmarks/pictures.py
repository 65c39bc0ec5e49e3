"""Pictures of the stored measurements: a roofline of the operators, and bars of ours beside the alternatives."""

from __future__ import annotations

import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import LogLocator, NullFormatter  # noqa: E402

from benchmarks.device_tables import grouped, ours_in  # noqa: E402
from benchmarks.tables import device  # noqa: E402

Rows = Sequence[Mapping[str, Any]]
OURS, OTHERS = "#d1495b", ("#8d99ae", "#c9cfdb", "#66a182", "#edae49", "#2e4057")
MARKERS = {"forward": "o", "backward": "s"}


def _finish(figure: Any, content: Mapping[str, Any], path: pathlib.Path) -> None:
    facts = content["operators"]["circumstances"]
    text = f"{device(facts)}, torch {facts['torch']}, {facts['date']}: {facts['command']}"
    figure.text(0.01, 0.01, "\n".join(textwrap.wrap(text, 130)), fontsize=8, color="#555555", va="bottom")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _first_state(rows: Rows) -> list[Mapping[str, Any]]:
    """With the L2 cache cold, where its state was a choice."""
    return [row for row in rows if row.get("L2", "cold") == "cold"]


def roofline(content: Mapping[str, Any], path: pathlib.Path) -> None:
    """Ours and eager, forward and backward, under what memory and arithmetic of this device allow."""
    rows = [row for row in _first_state(content["operators"]["rows"]) if row.get("phase") in MARKERS]
    machine = content["machine"]["rows"][0]
    figure, axes = plt.subplots(figsize=(9, 6))
    figure.subplots_adjust(bottom=0.16, left=0.09, right=0.98, top=0.93)
    intensities = [row["operations"] / row["bytes"] for row in rows if "refused" not in row]
    rate, peak = machine["copy, GB/s"], machine["float32 matrix product, GFLOP/s"]
    ridge = peak / rate
    low, high = 0.5 * min(*intensities, ridge), 2 * max(*intensities, ridge)
    axes.plot([low, ridge, high], [low * rate, peak, peak], color="black", lw=1.2)
    middle = (low * ridge) ** 0.5
    axes.annotate(f"copy, {rate:.3g} GB/s ", (middle, 1.08 * middle * rate), ha="right", fontsize=9)
    axes.annotate(f"float32 product, {peak:.3g} GFLOP/s", (high, 1.08 * peak), ha="right", fontsize=9)
    for operator, filled in (("depthwise_conv_bn_act", True), ("batch_norm_act", False)):
        for phase, marker in MARKERS.items():
            by_input = grouped(
                [r for r in rows if (r["operator"], r.get("phase")) == (operator, phase)], "operator", "input"
            )
            for who, colour in (("ours", OURS), ("eager", OTHERS[0])):
                chosen = [by_name.get(ours_in(by_name) if who == "ours" else "eager") for by_name in by_input.values()]
                chosen = [row for row in chosen if row is not None]
                axes.scatter(
                    [row["operations"] / row["bytes"] for row in chosen],
                    [row["operations"] / row["ms"] / 1e6 for row in chosen],
                    s=42, marker=marker, lw=1.4, color=colour if filled else "none", edgecolor=colour,
                    label=f"{who}, {operator}, {phase}", alpha=0.85,
                )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="operations a byte that the fused scheme moves", ylabel="GFLOP/s")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
    axes.set_title("The fused operators under the roofline, bfloat16", fontsize=12)
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(fontsize=8, loc="lower right")
    _finish(figure, content, path)


def bars(content: Mapping[str, Any], path: pathlib.Path) -> None:
    """Times of a call of each operator and of whole steps, as multiples of ours."""
    groups: dict[str, dict[str, float]] = {}
    both = [row for row in _first_state(content["operators"]["rows"]) if row.get("phase") == "both"]
    for (operator, label), by_name in grouped(both, "operator", "input").items():
        ours = ours_in(by_name)
        if ours:
            short = "dw " if operator == "depthwise_conv_bn_act" else "bn "
            groups[short + label] = {"ours" if n == ours else n: row["ms"] for n, row in by_name.items() if n != "copy"}
    for (name, batch), by_name in grouped(content.get("steps", {"rows": []})["rows"], "model", "batch").items():
        groups[f"step {name}, {batch}"] = {what: row["ms"] for what, row in by_name.items()}
    for (name,), by_name in grouped(content.get("fused", {"rows": []})["rows"], "model").items():
        groups[f"step {name}"] = {what: row["ms"] for what, row in by_name.items()}
    names = [name for name in dict.fromkeys(name for group in groups.values() for name in group) if name[:4] != "ours"]
    height = 0.13 * (len(names) + 1) * len(groups) + 2
    figure, axes = plt.subplots(figsize=(9, height))
    figure.subplots_adjust(bottom=1 / height, left=0.27, right=0.97, top=1 - 0.5 / height)
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        shift = (index - (len(names) - 1) / 2) * width
        places = [place + shift for place, group in enumerate(groups.values()) if name in group]
        ratios = [group[name] / group["ours"] for group in groups.values() if name in group]
        # From ours outwards: a bar to the left is a loss.
        axes.barh(places, [r - 1 for r in ratios], width, left=1, color=OTHERS[index % len(OTHERS)], label=name)
        for place, ratio in zip(places, ratios, strict=True):
            text, side = f" {ratio:.2g} " if ratio < 99.5 else f" {ratio:.0f} ", "left" if ratio >= 1 else "right"
            axes.annotate(text, (ratio, place), va="center", ha=side, fontsize=7)
    axes.axvline(1, color=OURS, lw=1.5, label="ours")
    axes.set_xscale("log")
    axes.set_xlim(0.9 * min(0.6, axes.get_xlim()[0]), 1.3 * axes.get_xlim()[1])
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(range(len(groups)), [f"{n}, {group['ours']:.3g} ms" for n, group in groups.items()], fontsize=8)
    axes.invert_yaxis()
    axes.set_ylim(len(groups) - 0.4, -0.6)
    axes.set_xlabel("time as a multiple of ours: to the right ours is faster, to the left slower")
    axes.set_title("Forward and backward in bfloat16; beside each name the time of ours", fontsize=11)
    axes.grid(True, axis="x", which="both", alpha=0.2)
    axes.legend(fontsize=8, loc="lower right")
    _finish(figure, content, path)
