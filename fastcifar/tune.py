"""`python -m fastcifar.tune`: searches options of a recipe on held-out training images."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import signal
from collections.abc import Sequence
from typing import Any

import torch

from fastcifar import command_line, data, models, recipe_flags, validation
from fastcifar.training import environment, loop, recipe, run_folder, search
from fastcifar.training.options import Recipe

_SHARE = 10


def _parser() -> command_line.Parser:
    parser = recipe_flags.parser(
        "python -m fastcifar.tune",
        "Searches options of a recipe. Trials are judged on --holdout training images (default: a tenth), never on the "
        "test images. All other options are those of fastcifar.train. The last line printed is one JSON object.",
    )
    group = parser.add_argument_group("search")
    group.add_argument(
        "--search", action="append", default=[], metavar="NAME=VALUES",
        help="an option to search: lr=0.1,0.4,0.8 or lr=0.05:2 or lr=0.05:2:log; may be repeated",
    )  # fmt: skip
    group.add_argument("--sampler", default="tpe", help="tpe, random, or grid (every combination)")
    group.add_argument("--pruner", default="hyperband", help="hyperband (ends bad trials early) or none")
    group.add_argument("--trials", type=command_line.whole_number, help="of the whole study; default: 20, grid: all")
    group.add_argument("--study", help="name; one that exists is gone on with; default: made of the options")
    group.add_argument("--storage", default="runs/tune.db", metavar="FILE", help="SQLite file; default: runs/tune.db")
    group.add_argument("--search-seed", type=command_line.whole_number, default=0, help="of the sampler")
    return parser


def _check(parsed: Any, base: Recipe) -> list[search.Range]:
    """The ranges, after all that can be checked before the data are read."""
    validation.choose("--sampler", parsed.sampler, search.SAMPLERS)
    validation.choose("--pruner", parsed.pruner, search.PRUNERS)
    if not parsed.search:
        raise ValueError("nothing to search: give --search, such as --search lr=0.05:2:log")
    space = [search.read_range(text) for text in parsed.search]
    names = [part.name for part in space]
    if len(set(names)) < len(names):
        raise ValueError(f"--search names an option twice: {', '.join(names)}")
    for name in ("steps", "epochs", "model", "preset", "dataset", "data_dir", "holdout"):
        if name in names:
            raise ValueError(f"--search {name}: must be the same for all trials")
    if parsed.sampler == "grid" and not all(part.choices for part in space):
        raise ValueError("--sampler grid needs values for each --search, such as lr=0.1,0.4,0.8")
    if parsed.trials is not None and parsed.trials < 1:
        raise ValueError(f"--trials must be ≥ 1, got {parsed.trials}")
    if base.model in models.list_models(gan=True):
        raise ValueError(f"tuning is for classifiers, --model {base.model} is a GAN")
    for part in space:
        for value in part.choices or (part.low, part.high):
            dataclasses.replace(base, **{part.name: part.kind(value)})
    return space


def _show(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    """The table of all trials."""
    columns = ["trial", "accuracy", "steps", "seconds", *names]
    lines = [[_text(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in (columns, *lines)) for i in range(len(columns))]
    for line in (columns, *lines):
        print("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)))


def _text(value: Any) -> str:
    return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def main(arguments: Sequence[str]) -> int:
    """Searches as the arguments say; returns the exit status.

    Raises:
        ValueError, OSError: a mistake of the user; the message says what to do.
    """
    parsed = _parser().parse_args(arguments)
    validation.require("tune", "optuna")
    config = recipe.read_config(parsed.config) if parsed.config else {}
    flags = recipe_flags.given(parsed)
    base = recipe.resolve(flags, config, has_gpu=torch.cuda.is_available())
    space = _check(parsed, base)
    recipe.check_effect(dict.fromkeys(part.name for part in space) | flags, base)
    device = environment.choose_device(base.device)
    settings = environment.prepare_process(device, deterministic=base.deterministic)
    dataset = data.load_dataset(base.dataset, base.data_dir)
    base = dataclasses.replace(base, holdout=base.holdout or max(1, len(dataset.train_labels) // _SHARE))
    dataset = data.hold_out(dataset, base.holdout)
    budget = recipe.with_budget(base, len(dataset.train_images))
    for notice in dataset.notices:
        print(notice)
    storage = pathlib.Path(parsed.storage)
    described = f"{base.model}-{dataset.name}-{base.preset}-{budget.steps}-{parsed.sampler}"
    name = parsed.study or "".join(c if c.isalnum() else "-" for c in described)
    # Another process would take this one's trial for what a killed one left.
    with run_folder.claimed(storage.parent / name):
        study = search.open_study(name, storage, parsed.sampler, parsed.pruner, budget, space, parsed.search_seed)
        tuning = search.Search(study, base, space, dataset, device, grid=parsed.sampler == "grid")
        grid = math.prod(len(part.choices) for part in space) if parsed.sampler == "grid" else None
        trials = min(parsed.trials or grid or 20, grid or 2**31)
        print(f"study {name} in {storage}: {len(tuning.finished())} of {trials} trials done")
        status = _search(tuning, trials)
        if not status:
            env = environment.describe(device, settings, "fastcifar.tune")
            run_folder.write_json(storage.parent / name / "env.json", env)
            _report(tuning, name, storage.parent / name, budget.steps, dataset)
    return status


def _search(tuning: search.Search, trials: int) -> int:
    """Runs the trials that are missing; the exit status."""
    try:
        tuning.run(trials, lambda line: print(line, flush=True))
    except loop.Stopped as stopped:
        done = len(tuning.finished())
        print(f"stopped after {done} of {trials} trials; the same command goes on from there", flush=True)
        return 128 + (stopped.signal or signal.SIGTERM)
    except loop.OutOfMemory as failure:
        raise MemoryError(str(failure)) from failure
    return 0


def _report(tuning: search.Search, name: str, place: pathlib.Path, steps: int, dataset: data.ImageDataset) -> None:
    """Prints the trials and keeps them, and the best options, in the study's folder."""
    base = tuning.base
    rows, names = tuning.rows(), [part.name for part in tuning.space]
    _show(rows, names)
    best = rows[0]
    values = {option: best[option] for option in names}
    chosen = dataclasses.asdict(base) | values | {"holdout": 0}
    result = {
        "study": name, "model": base.model, "dataset": dataset.name, "preset": base.preset, "steps": steps,
        "batch_size": base.batch_size, "holdout": base.holdout, "finished": len(rows), "best_trial": best["trial"],
        "best_accuracy": best["accuracy"], "best": values, "trials": rows,
    }  # fmt: skip
    run_folder.write_json(place / "result.json", result)
    lines = [f"{key}: {json.dumps(value)}\n" for key, value in chosen.items() if value is not None]
    (place / "best.yaml").write_text("".join(lines))
    print(f"best: {search.describe(values)}; for the whole training set: --config {place / 'best.yaml'}")
    print(json.dumps({key: value for key, value in result.items() if key != "trials"}), flush=True)


if __name__ == "__main__":
    command_line.run("python -m fastcifar.tune", main)
