"""The published systems beside the runs of them that are stored: a table for the README."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import reporting
from fastcifar.training import recipe as recipes
from fastcifar.training.options import flag


@dataclass(frozen=True)
class System:
    """A published system: name of its network, published test accuracy."""

    model: str
    published: str


CLASSIFIERS = (
    System("ds_resnet", "57.7 ± 2.3 %, 10,000 × 512"),
    System("ds_resnet_x2", "65 %"),
    System("small_filters_cnn", "33.9 %, 10,000 steps"),
    System("modify_resnet", "65.5 %, 26 epochs, images × 3"),
    System("xception", "72.9 %, 46 epochs, from ImageNet"),
    System("resnet_cifar10", "CIFAR-10: 79.3 %, 30 epochs"),
)


def runs() -> list[dict[str, Any]]:
    """All stored trainings of classifiers on real images."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(reporting.RESULTS.glob("run-*.json"))]
    return [run for run in found if "test_accuracy" in run["result"] and not run["result"]["synthetic"]]


def recipe(run: Mapping[str, Any]) -> str:
    """The preset of a run, and the options in which the run differs from what that preset is today."""
    config = {**dataclasses.asdict(recipes.Recipe()), **run["config"]}  # an older run lacks newer options
    flags = {key: config[key] for key in ("preset", "model", "steps", "seed", "dataset")}
    if config["preset"] == "best":
        flags["teacher"] = config["teacher"]
    today = recipes.with_budget(recipes.resolve(flags, has_gpu=False), images=50_000)
    changed = recipes.differences(dataclasses.asdict(today), config)
    options = [(line.partition(":")[0], line.rpartition(" → ")[2].strip("'")) for line in changed]
    others = {"teacher": None, "init_weights": None, "backbone": today.backbone}
    options += [(name, config[name]) for name, usual in others.items() if config[name] not in (None, usual)]
    trained_on = run["result"]["dataset"].partition("-holdout")[0]
    if trained_on != recipes.PRESETS[config["preset"]].get("dataset", "cifar100"):
        options.append(("dataset", trained_on))
    return " ".join([f"`{config['preset']}`", *(f"`{flag(name)} {value}`" for name, value in options)])


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation in percent; of one value, that value."""
    if len(values) == 1:
        return f"{values[0]:.1f} %"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f} %"


def _row(system: System, group: list[dict[str, Any]]) -> dict[str, Any]:
    results = [run["result"] for run in group]
    seconds = statistics.mean(result["seconds"] for result in results)
    copies = [result["test_accuracy_tta"] for result in results if "test_accuracy_tta" in result]
    return {
        "network": f"`{system.model}`",
        "published": system.published,
        "here": recipe(group[0]),
        "steps": f"{results[0]['steps']:,} × {results[0]['batch_size']}",
        "seeds": len(results),
        "test accuracy": spread([result["test_accuracy"] for result in results]),
        "with mirrored and shifted copies": spread(copies) if copies else "–",
        "train accuracy": spread([result["train_accuracy"] for result in results]),
        "training": f"{seconds / 60:.0f} min" if seconds > 200 else f"{seconds:.0f} s",
    }


def rows() -> list[dict[str, Any]]:
    """A row for each system, recipe and budget, longest first; systems without a run say so."""
    found = []
    everything = runs()
    for system in CLASSIFIERS:
        groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for run in everything:
            if run["result"]["model"] == system.model:
                groups.setdefault((recipe(run), run["result"]["steps"] * run["result"]["batch_size"]), []).append(run)
        ordered = sorted(groups.items(), key=lambda item: -item[0][1])
        found += [_row(system, group) for _, group in ordered]
        if not groups:
            found.append({**dict.fromkeys(found[0], "–"), **_unmeasured(system)})
    return found


def _unmeasured(system: System) -> dict[str, str]:
    return {"network": f"`{system.model}`", "published": system.published, "here": "not measured"}
