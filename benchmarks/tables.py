"""`python -m benchmarks.tables`: writes the READMEs' tables from the stored results; `--check` only compares.

A document says where with `<!-- table NAME -->` and `<!-- end -->`; what stands between them is replaced.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import reporting, scaling_model, static, traffic

ROOT = reporting.RESULTS.parent.parent
DOCUMENTS = (ROOT / "README.md", ROOT / "kernels" / "README.md", ROOT / "docs" / "scaling.md")
PLACE = re.compile(r"(<!-- table (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


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
    return "–" if value is None else str(value)


def source(name: str) -> str:
    """The line under a table: where its numbers come from."""
    facts = stored(name)["circumstances"]
    where = facts.get("gpu") or f"{facts['threads']} cores of {facts['processor']}, {facts['instructions']}"
    return (
        f"\n`{facts['command']}`, {facts['date']}, torch {facts['torch']}, {where}: `benchmarks/results/{name}.json`.\n"
    )


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


def demo_table() -> str:
    """Short trainings on real CIFAR-100."""
    rows = []
    for path in sorted(reporting.RESULTS.glob("demo-*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))["result"]
        rows.append(
            {
                "network": f"`{result['model']}`",
                "parameters": f"{result['parameters']:,}",
                "training": f"{result['seconds']:.0f} s",
                "test accuracy": f"{result['test_accuracy']:.1f} %",
                "with mirrored and shifted copies": f"{result['test_accuracy_tta']:.1f} %",
            }
        )
    return markdown(rows)


def fuse_table() -> str:
    """A training step of torchvision's models, original and fused."""
    rows = [{name: value for name, value in row.items() if name != "input"} for row in stored("fuse-cpu")["rows"]]
    size = stored("fuse-cpu")["rows"][0]["input"]
    return f"{markdown(rows)}\nOne training step, {size}, bfloat16.\n{source('fuse-cpu')}"


def operators_table() -> str:
    """The fused operators beside eager and compiled PyTorch."""
    rows = stored("operators-cpu-bf16")["rows"]
    kept = [{key: value for key, value in row.items() if key != "% of copy rate"} for row in rows]
    return f"{markdown(kept)}\nForward and backward in training, bfloat16.\n{source('operators-cpu-bf16')}"


def step_table() -> str:
    """A whole training step of ds_resnet."""
    found = stored("training_step")
    rows = []
    for row in found["rows"]:
        if "loader" not in row["what"]:
            rest = {key: value for key, value in row.items() if key != "what"}
            rows.append({"ds_resnet, batch 512, bfloat16": row["what"], **rest})
    memory = ", ".join(f"{what} {value:.0f}" for what, value in found["peak_mib"].items())
    share, start = found["loader_percent_of_step"], found["start_up_seconds"]
    text = f"Peak memory of a step, MiB: {memory}. The loader takes {share:.1f} % of the step; start to first step"
    return f"{markdown(rows)}\n{text} {start:.1f} s.\n{source('training_step')}"


def runs_table() -> str:
    """Longer trainings."""
    rows = []
    for path in sorted(reporting.RESULTS.glob("fast*-*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))["result"]
        rows.append(
            {
                "network": f"`{result['model']}`",
                "steps": f"{result['steps']:,} × {result['batch_size']}",
                "training": f"{result['seconds']:.0f} s",
                "train accuracy": f"{result['train_accuracy']:.1f} %",
                "test accuracy": f"{result['test_accuracy']:.1f} %",
                "with mirrored and shifted copies": f"{result['test_accuracy_tta']:.1f} %",
            }
        )
    return markdown(rows)


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


def gan_step_table() -> str:
    """A whole step of aw_sngan."""
    return markdown(stored("gan-step-cpu")["rows"]) + source("gan-step-cpu")


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


def spectral_table() -> str:
    """The discriminator's spectral norm."""
    return markdown(stored("spectral-cpu")["rows"]) + source("spectral-cpu")


def hinge_table() -> str:
    """What the adaptive weights cost."""
    step, weights = (markdown(stored(name)["rows"]) for name in ("hinge-step-cpu", "hinge-weights-cpu"))
    return (
        f"A step of aw_sngan's discriminator, batch 64, beside a plain hinge step:\n\n{step}\n"
        f"The weighting alone, beside one tensor at a time:\n\n{weights}{source('hinge-weights-cpu')}"
    )


def scaling_volume_table() -> str:
    """What the processes exchange in a step."""
    found = stored("scaling-cpu")
    rows: dict[str, dict[str, Any]] = {}
    for row in found["volume"]:
        line = rows.setdefault(
            row["task"], {"a step of": row["task"], "all-gather": 0, "all-reduce": 0, "all-to-all": 0}
        )
        line[row["kind"].replace("_", "-")] += row["calls"]
        line["bytes"] = line.get("bytes", 0) + row["calls"] * row["bytes"]
    largest = {task: max(r["bytes"] for r in found["volume"] if r["task"] == task) for task in rows}
    lines = [{**row, "of these the largest call": largest[task]} for task, row in rows.items()]
    return f"{markdown(lines)}\nCalls, and the bytes that each process puts into them.\n{source('scaling-cpu')}"


def scaling_check_table() -> str:
    """The model beside measured steps."""
    found = stored("scaling-cpu")
    fits = "; ".join(
        f"{row['processes']} processes: {1e6 * row['base']:.0f} µs a call, {1e6 * row['alpha']:.0f} µs a hop, "
        f"{1e9 * row['beta']:.2f} ns a byte"
        for row in found["gloo"]
    )
    names = ("kind", "processes", "bytes")
    timed = [
        {**{name: row[name] for name in names}, "measured, µs": 1e6 * row["seconds"], "model, µs": 1e6 * row["model"]}
        for row in found["collectives"]
    ]
    text = (
        f"Fitted to these: {fits}. One thread for each process, {found['cores']} cores; load of the machine at the end "
        f"{found['load_average']:.1f}."
    )
    return f"{markdown(timed)}\n{text}\n\n{markdown(found['check'])}{source('scaling-cpu')}"


def _projected(rows: Sequence[Mapping[str, Any]]) -> str:
    return (
        f"{markdown(rows)}\nA model, not a measurement: collectives counted in `benchmarks/results/scaling-cpu.json`.\n"
    )


def scaling_each_table() -> str:
    """A model of up to 1,024 GPUs, with the same batch on each."""
    volumes = stored("scaling-cpu")["volume"]
    return _projected(scaling_model.projection(volumes, GPUS, images=512, each=True))


def scaling_all_table() -> str:
    """A model of up to 1,024 GPUs that share one batch."""
    volumes = stored("scaling-cpu")["volume"]
    return _projected(scaling_model.projection(volumes, GPUS, images=8192, each=False))


def scaling_remedies_table() -> str:
    """A model of what helps."""
    return _projected(scaling_model.remedies(stored("scaling-cpu")["volume"], (8, 64, 1024)))


GPUS = (1, 2, 4, 8, 16, 64, 256, 1024)
TABLES = {
    "scaling-volume": scaling_volume_table,
    "scaling-check": scaling_check_table,
    "scaling-each": scaling_each_table,
    "scaling-all": scaling_all_table,
    "scaling-remedies": scaling_remedies_table,
    "passes": passes_table,
    "gan": gan_table,
    "gan-step": gan_step_table,
    "operators": operators_table,
    "step": step_table,
    "runs": runs_table,
    "hinge": hinge_table,
    "spectral": spectral_table,
    "fuse": fuse_table,
    "static": static_table,
    "traffic": traffic_table,
    "launches": launches_table,
    "demo": demo_table,
}


def filled(document: str) -> str:
    """The document with its tables written anew."""
    return PLACE.sub(lambda place: place[1] + TABLES[place[2]]() + place[3], document)


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes, or with --check names the documents that differ; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if a document differs")
    check = parser.parse_args(arguments).check
    stale = [path for path in DOCUMENTS if filled(path.read_text(encoding="utf-8")) != path.read_text(encoding="utf-8")]
    for path in stale:
        print(f"{path.relative_to(ROOT)}: {'differs from the stored results' if check else 'written'}")
        if not check:
            path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
