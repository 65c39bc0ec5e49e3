"""Tables in Markdown of what `pytest benchmarks --benchmark-only --store` measured: results/DEVICE-torchVERSION.json.

A table stands once for each kind of device that was measured, a CPU before a GPU, by the newest file of that kind.
"""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks import model, reporting
from benchmarks.tables import device, markdown, origin

Rows = Sequence[Mapping[str, Any]]


def files() -> dict[str, tuple[str, dict[str, Any]]]:
    """Name and content of the newest file of each kind of device, "cpu" before "gpu"."""
    found: dict[str, tuple[tuple, pathlib.Path, dict]] = {}
    for path in sorted(reporting.RESULTS.glob("*-torch*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        facts = content["machine"]["circumstances"]
        age = (facts["date"], [int(part) for part in facts["torch"].split("+")[0].split(".") if part.isdigit()])
        kind = "gpu" if "gpu" in facts else "cpu"
        if kind not in found or age > found[kind][0]:
            found[kind] = (age, path, content)
    return {kind: (found[kind][1].stem, found[kind][2]) for kind in ("cpu", "gpu") if kind in found}


def for_each_device(*names: str) -> Callable:
    """Decorates a function of the rows of these tables of one device's file, which it gives once for each device."""

    def decorate(function: Callable[..., str]) -> Callable[[], str]:
        @functools.wraps(function)
        def whole() -> str:
            parts = [
                function(*(content[name]["rows"] for name in names)) + origin(content[names[0]]["circumstances"], file)
                for file, content in files().values()
                if all(name in content for name in names)
            ]
            return "\n".join(parts) or "Not measured yet.\n"

        return whole

    return decorate


def grouped(rows: Rows, *keys: str) -> dict[tuple, dict[str, Mapping[str, Any]]]:
    """By the values of these keys, then by what was measured; without what was refused."""
    found: dict[tuple, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        if "refused" not in row:
            found.setdefault(tuple(row.get(key) for key in keys), {})[row["what"]] = row
    return found


def uniform(rows: Rows) -> list[dict[str, Any]]:
    """The same with all keys in every row."""
    names = list(dict.fromkeys(key for row in rows for key in row))
    return [{name: row.get(name) for name in names} for row in rows]


def refusals(rows: Rows) -> str:
    """A line for what was not timed."""
    found = dict.fromkeys(f"{row['what']} ({row['refused']})" for row in rows if "refused" in row)
    return f"\nNot timed: {', '.join(found)}.\n" if found else ""


def ours_in(names: Mapping[str, Any]) -> str | None:
    """Which of these is ours."""
    return next((name for name in ("triton", "native", "ours", "group") if name in names), None)


@for_each_device("operators")
def operators_table(rows: Rows) -> str:
    """The fused operators, forward and backward together, beside eager and compiled PyTorch."""
    chosen = [row for row in rows if row.get("phase", "both") == "both"]
    table = []
    for (operator, label, l2), by_name in grouped(chosen, "operator", "input", "L2").items():
        ours = ours_in(by_name)
        line = {"operator": operator, "input": label} | ({} if l2 is None else {"L2": l2})
        line |= {f"{name}, ms": row["ms"] for name, row in by_name.items() if name != "copy"}
        if ours:
            line["floor, ms"] = by_name[ours]["floor, ms"]
            line["eager / ours"] = by_name["eager"]["ms"] / by_name[ours]["ms"]
            if "torch.compile" in by_name:
                line["compile / ours"] = by_name["torch.compile"]["ms"] / by_name[ours]["ms"]
            line["ours / floor"] = by_name[ours]["ms"] / by_name[ours]["floor, ms"]
        table.append(line)
    # Columns that a first row lacks still stand before the ratios.
    order = sorted(uniform(table)[0], key=lambda name: (" / " in name, name == "floor, ms"))
    table = [{name: row[name] for name in order} for row in uniform(table)]
    return f"{markdown(table)}{refusals(rows)}\nForward and backward in training, bfloat16.\n"


@for_each_device("operators")
def phases_table(rows: Rows) -> str:
    """Ours forward and backward, each beside the copy."""
    table = []
    for (operator, label, l2), by_name in grouped(rows, "operator", "input", "L2").items():
        ours = ours_in(by_name)
        if not ours:
            continue
        line = {"operator": operator, "input": label} | ({} if l2 is None else {"L2": l2})
        for phase in ("forward", "backward"):
            match = (operator, label, l2, phase)
            by_phase = grouped(rows, "operator", "input", "L2", "phase")[match]
            line[phase] = f"{by_phase[ours]['ms']:.3g} ms, {by_phase[ours]['% of copy rate']:.0f} %"
            line[f"eager, {phase}"] = f"{by_phase['eager']['ms']:.3g} ms"
        line |= {"peak, MiB": by_name[ours]["peak, MiB"], "eager, peak": by_name["eager"]["peak, MiB"]}
        table.append(line)
    return f"{markdown(table)}\nMilliseconds, and the share of the rate at which x is copied; bfloat16.\n"


@for_each_device("steps", "loader", "start")
def step_table(rows: Rows, loader: Rows, start: Rows) -> str:
    """Whole training steps of ds_resnet and its double width."""
    table = []
    for (name, batch), by_name in grouped(rows, "model", "batch").items():
        for what, row in by_name.items():
            line = {"network, batch": f"{name}, {batch}", "step": what, "ms": row["ms"], "images/s": row["images/s"]}
            line["times ours"] = row["ms"] / by_name["ours"]["ms"]
            table.append(line | {"peak, MiB": row["peak, MiB"]})
    step = next(row["ms"] for row in rows if row["what"] == "ours" and row["model"] == "ds_resnet")
    share = 100 * next(row["ms"] for row in loader if row["what"] == "loader") / step
    seconds = start[0]["start to first step, s"]
    text = (
        "bfloat16. Eager is the same network in plain PyTorch, channels-last; contiguous the same in NCHW. "
        '"With loader" is the trainer\'s own step, whose images come in bfloat16; the others cast float32 images.\n'
        f"The loader takes {share:.1f} % of ds_resnet's step; start to first step {seconds:.1f} s."
    )
    return f"{markdown(table)}{refusals(rows)}\n{text}\n"


@for_each_device("fused")
def fuse_table(rows: Rows) -> str:
    """A training step of torchvision's models, original and fused."""
    table = []
    keys = ("model", "depthwise groups", "batch-norm groups")
    for values, by_name in grouped(rows, *keys).items():
        line = dict(zip(keys, values, strict=True)) | {f"{name}, ms": row["ms"] for name, row in by_name.items()}
        table.append(line | {"eager / ours": by_name["eager"]["ms"] / by_name["ours"]["ms"]})
    return f"{markdown(uniform(table))}{refusals(rows)}\nOne training step, {rows[0]['input']}, bfloat16.\n"


@for_each_device("augment")
def augment_table(rows: Rows) -> str:
    """A batch out of the resident set, augmented."""
    table = []
    for (augmentations, l2), by_name in grouped(rows, "augmentations", "L2").items():
        ours = by_name["ours"]
        line = {"augmentations": augmentations} | ({} if l2 is None else {"L2": l2})
        line |= {f"{name}, ms": row["ms"] for name, row in by_name.items()}
        line |= {"eager / ours": by_name["eager"]["ms"] / ours["ms"], "% of copy rate": ours["% of copy rate"]}
        table.append(line)
    return f"{markdown(uniform(table))}{refusals(rows)}\n{rows[0]['batch']} images of 32×32, bfloat16.\n"


_BY_ROUND = "\nRatios are medians of the ratios within each round, not quotients of these medians.\n"


@for_each_device("gan-step")
def gan_step_table(rows: Rows) -> str:
    """A whole step of aw_sngan."""
    return markdown([{name: value for name, value in row.items() if name != "batch"} for row in rows]) + _BY_ROUND


@for_each_device("spectral")
def spectral_table(rows: Rows) -> str:
    """The discriminator's spectral norm."""
    chosen, table = [row for row in rows if row.get("phase", "both") == "both"], []
    for (layers, passes, l2), by_name in grouped(chosen, "layers", "forward passes", "L2").items():
        line = {"layers": layers, "forward passes": passes} | ({} if l2 is None else {"L2": l2})
        line |= {f"{name}, ms": row["ms"] for name, row in by_name.items()}
        line |= {
            f"{name} / group": by_name[name]["ms"] / by_name["group"]["ms"] for name in ("torch", "batched products")
        }
        table.append(line)
    return markdown(uniform(table)) + refusals(rows)


@for_each_device("hinge-weights", "hinge-step")
def hinge_table(weights: Rows, step: Rows) -> str:
    """What the adaptive weights cost."""
    chosen, table = [row for row in weights if row.get("phase", "both") == "both"], []
    for (l2,), by_name in grouped(chosen, "L2").items():
        line = ({} if l2 is None else {"L2": l2}) | {f"{name}, ms": row["ms"] for name, row in by_name.items()}
        table.append(line | {"by tensors / ours": by_name["by tensors"]["ms"] / by_name["ours"]["ms"]})
    return (
        f"A step of aw_sngan's discriminator, batch 64, beside a plain hinge step:\n\n{markdown(step)}{_BY_ROUND}\n"
        f"Losses, weights and weighted gradients alone, beside one tensor at a time:\n\n{markdown(uniform(table))}"
        f"{refusals(weights)}"
    )


@for_each_device("machine")
def machine_table(rows: Rows) -> str:
    """What the device can do."""
    return markdown(rows)


def layers_table() -> str:
    """Bytes and operations of every layer of a step of ds_resnet."""
    stored, again = model.layers(on_gpu=False), model.layers(on_gpu=True)
    rows = [
        {
            "layer": f"`{layer.name}`", "kind": layer.kind, "channels, pixels": layer.shape,
            "forward, MB": layer.forward_bytes / 1e6, "backward, MB": layer.backward_bytes / 1e6,
            "both on a GPU, MB": other.bytes / 1e6, "GFLOP": layer.operations / 1e9,
        }
        for layer, other in zip(stored, again, strict=True)
    ]  # fmt: skip
    return f"{markdown(rows)}\nds_resnet, batch {model.BATCH}, bfloat16; counted by `benchmarks/model.py`.\n"


def floors_table() -> str:
    """The floor of a step by kind of layer and device."""
    rates = {device(c["machine"]["circumstances"]): (model.rates(c["machine"]["rows"][0]), kind == "gpu")
             for kind, (_, c) in files().items()}  # fmt: skip
    rates["H200, public figures, not measured"] = (model.H200, True)
    rows = []
    for name, (rate, on_gpu) in rates.items():
        line = {"device": name} | rate
        for row in model.by_kind(model.layers(on_gpu=on_gpu), rate):
            line[f"{row['kind']}, ms"] = 1e3 * row["seconds"]
        rows.append(line)
    return markdown(rows)


@for_each_device("step-parts", "machine", "steps")
def parts_table(parts: Rows, machine: Rows, steps: Rows) -> str:
    """Predicted beside measured, by part of a step."""
    layers = model.layers(on_gpu=machine[0]["device"] == "cuda")
    found = {row["kind"]: 1e3 * row["seconds"] for row in model.by_kind(layers, model.rates(machine[0]))}
    predicted = {
        "fused operators": found["batch_norm_act"] + found["depthwise_conv_bn_act"],
        "convolutions": found["convolution"],
        "everything else": found["gradient sum"],
    }
    rows = [(row["part"], predicted[row["part"]], row["ms"]) for row in parts]
    rows.append(("sum of the parts, under the profiler", sum(predicted.values()), sum(row["ms"] for row in parts)))
    ours = next(row["ms"] for row in steps if row["what"] == "ours" and row["model"] == "ds_resnet")
    rows.append(("whole step", found["all layers"], ours))
    names = ("part", "predicted floor, ms", "measured, ms", "measured / floor")
    return markdown([dict(zip(names, (*row, row[2] / row[1]), strict=True)) for row in rows])


TABLES = {
    "operators": operators_table,
    "phases": phases_table,
    "step": step_table,
    "fuse": fuse_table,
    "augment": augment_table,
    "gan-step": gan_step_table,
    "spectral": spectral_table,
    "hinge": hinge_table,
    "machine": machine_table,
    "layers": layers_table,
    "floors": floors_table,
    "parts": parts_table,
}
