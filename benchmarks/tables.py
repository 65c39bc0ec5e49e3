"""Tables in Markdown of the results that have a file of their own; `benchmarks.report` writes them into documents."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import promises, reporting, static, systems, traffic


def stored(name: str) -> dict[str, Any]:
    """The content of a stored result."""
    return json.loads((reporting.RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of equal keys as a Markdown table."""
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([_text(row[name]) for name in names] for row in rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    return "–" if value is None else str(value)


def source(name: str) -> str:
    """The line under a table of a result of its own: where its numbers come from."""
    return origin(stored(name)["circumstances"], name)


def origin(facts: Mapping[str, Any], name: str) -> str:
    """Command, date, versions, device and file."""
    return (
        f"\n`{facts['command']}`, {facts['date']}, torch {facts['torch']}, {device(facts)}: "
        f"`benchmarks/results/{name}.json`.\n"
    )


def device(facts: Mapping[str, Any]) -> str:
    """The measured device of these circumstances."""
    cores = f"{facts['threads']} core{'s' if facts['threads'] > 1 else ''}"
    return facts.get("gpu") or f"{cores} of {facts['processor']}, {facts['instructions']}"


def static_table() -> str:
    """Compiled kernels: the worst of each kernel's cases."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for line in static.summary(stored("static")["rows"]):
        found.setdefault(line["kernel"], {})[line["sm"]] = line
    rows = []
    for kernel, by_sm in found.items():
        lines = list(by_sm.values())
        row = {"kernel": f"`{kernel}`", "cases": lines[0]["cases"]}
        row |= {f"registers sm_{sm}": line["registers"] for sm, line in by_sm.items()}
        row["spills"] = sum(line["spills"] + line["stack"] for line in lines)
        row["demanded access, bits"] = min((x["demanded_bits"] for x in lines if x["demanded_bits"]), default=None)
        rows.append(row)
    count = len(stored("static")["rows"])
    return f"{markdown(rows)}\n{count} compilations; the worst of each kernel's cases.\n{source('static')}"


def traffic_table() -> str:
    """Bytes moved by each operator, in passes over x."""
    return markdown(traffic.summary(stored("traffic")["results"])) + source("traffic")


def launches_table() -> str:
    """The launches of one typical call, in passes over x."""
    label = "3×3 s1 1×32×32×32 fp16"
    result = next(r for r in stored("traffic")["results"] if r["label"] == label)
    return f"{markdown(traffic.launch_table(result))}\n{result['operator']} {label}, the same file.\n"


def systems_table() -> str:
    """Trainings of the published classifiers on real images."""
    measured = systems.runs()
    on = sorted({f"{r['env']['hardware']['cpus']} cores of {r['env']['hardware']['processor']}" for r in measured})
    versions = sorted({r["env"]["versions"]["torch"] for r in measured})
    dates = sorted({r["date"] for r in measured})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return (
        f"{markdown(systems.rows())}\nReal images, weights of the last step, {', '.join(on)}, torch "
        f"{', '.join(versions)}, {when}: `benchmarks/results/run-MODEL-PRESET-STEPS-seedN.json`, each with its "
        "command and all options.\n"
    )


def searches_table() -> str:
    """Searches for recipes: their trials, best first."""
    parts = []
    for path in sorted(reporting.RESULTS.glob("search-*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        result, env = found["result"], found["env"]
        rows = [
            {
                **{name: trial[name] for name in result["best"]},
                "accuracy": f"{trial['accuracy']:.1f} %{', pruned' if trial['pruned'] else ''}",
                "steps": trial["steps"],
            }
            for trial in result["trials"]
            if trial["accuracy"] is not None
        ]
        command, images = " ".join(env["command"]), result["dataset"].partition("-")[0]
        parts.append(
            f"{markdown(rows)}\n`{result['model']}`, {result['holdout']:,} images held out of {images}: "
            f"`{command}`, {found['date']}, torch {env['versions']['torch']}, {env['hardware']['cpus']} cores of "
            f"{env['hardware']['processor']}: `benchmarks/results/{path.name}`.\n"
        )
    return "\n".join(parts) or "Not measured yet.\n"


def gan_table() -> str:
    """GANs trained on two cores."""
    rows = []
    for path in sorted(reporting.RESULTS.glob("gan-run-*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))["result"]
        rows.append(
            {
                "GAN": f"`{result['model']}`{', conditional' if result['conditional'] else ''}",
                "steps": f"{result['steps']:,} × {result['batch_size']}",
                "training": f"{result['seconds'] / 60:.0f} min",
                "Fréchet distance": result["fd"],
                "kernel distance": result["kid"],
                "precision": result["precision"],
                "recall": result["recall"],
                "density": result["density"],
                "coverage": result["coverage"],
            }
        )
    if not rows:
        return "Not measured yet.\n"
    first = json.loads(next(reporting.RESULTS.glob("gan-run-*.json")).read_text(encoding="utf-8"))["result"]
    return (
        f"{markdown(rows)}\nReal CIFAR-100, {first['samples']:,} samples against {first['reference']}, features of a "
        f"{first['extractor']} (`{first['extractor_sha256'][:12]}`), resized: {first['resize']}: "
        "`benchmarks/results/gan-run-MODEL.json`.\n"
    )


def passes_table() -> str:
    """Each pass of the CPU core."""
    found = stored("passes-cpu")
    parts = []
    for name, operator in (("depthwise", "depthwise_conv_bn_act"), ("batch_norm", "batch_norm_act")):
        by_input: dict[str, dict[str, Any]] = {}
        for row in found[name]:
            line = by_input.setdefault(row["input"], {operator: row["input"]})
            line[row["pass"]] = f"{row['ms']:.2f} ms, {row['% of copy rate']:.0f} %"
        parts.append(markdown(list(by_input.values())))
    text = "Milliseconds, and the share of the rate at which x is copied; bfloat16."
    return f"{chr(10).join(parts)}\n{text}\n{source('passes-cpu')}"


def trials_table(name: str) -> str:
    """Alternatives of one training."""
    found = stored(name)
    rows = [
        {
            "training": row["what"],
            "test accuracy": systems.spread([run["test_accuracy"] for run in row["runs"]]),
            "train accuracy": f"{row['train accuracy, %']:.1f} %",
        }
        for row in found["rows"]
    ]
    before = found.get("pretrained") or found["teacher"]
    what = "teacher" if "teacher" in found else "backbone"
    text = f"{found['steps']} steps × 128, {found['seeds']} seeds, real CIFAR-100; {what}: {before['model']}"
    return f"{markdown(rows)}\n{text} after {before['steps']:,} steps.\n{source(name)}"


def first_steps_table() -> str:
    """Presets cut to a few steps."""
    rows = []
    for path in sorted(reporting.RESULTS.glob("first-steps-*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        row = content["rows"][0]
        tested = row.get("test accuracy, %")
        rows.append(
            {
                "preset": f"`{row['model']}`, `{row['preset']}`",
                "cut to": f"{row['steps']} × {row['batch']}",
                "loss, first and last quarter": f"{row['loss, first quarter']:.2f} → {row['loss, last quarter']:.2f}",
                "test accuracy": f"{tested:.1f} % of {row['test images']:,}" if tested is not None else "–",
                "peak memory": f"{row['peak MiB']:,} MiB",
                "a step": f"{row['seconds a step']:.2f} s",
                "cores": content["circumstances"]["threads"],
                "whole preset at this batch": f"{row['whole preset, steps']:,} steps",
            }
        )
    return f"{markdown(rows)}\n`benchmarks/results/first-steps-MODEL-PRESET.json`, each with its command.\n"


def promises_table() -> str:
    """Each promise, what tries to break it, and what came of it."""
    return f"{markdown(promises.rows())}{source('promises')}{source('kills')}"


def compress_table() -> str:
    """Pruned and quantised networks."""
    return markdown(stored("compress-cpu")["rows"]) + source("compress-cpu")


def robustness_table() -> str:
    """Accuracy under attack."""
    rows = [
        {
            "network": f"`{row['network']}`",
            "trained": row["trained"],
            "steps": f"{row['steps']}{', after the first row' if row['from other weights'] else ''}",
            "test accuracy": f"{row['accuracy, %']:.1f} %",
            **{key.removesuffix(", %"): f"{row[key]:.1f} %" for key in row if key.startswith("under PGD-20")},
        }
        for row in stored("robustness")["rows"]
    ]
    return markdown(rows) + source("robustness")


TABLES = {
    "compress": compress_table,
    "robustness": robustness_table,
    "promises": promises_table,
    "transfer": lambda: trials_table("transfer-cpu"),
    "distil": lambda: trials_table("distil-cpu"),
    "first-steps": first_steps_table,
    "passes": passes_table,
    "gan": gan_table,
    "static": static_table,
    "traffic": traffic_table,
    "launches": launches_table,
    "systems": systems_table,
    "searches": searches_table,
}
