"""A search over options of a recipe: trainings judged on held-out training images, kept in an Optuna study."""

from __future__ import annotations

import dataclasses
import itertools
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastcifar import data, validation
from fastcifar.training import distributed, recipe, transfer
from fastcifar.training.classify import Classification
from fastcifar.training.loop import Loop, NotFinite, Stopped
from fastcifar.training.options import Recipe, flag, options
from fastcifar.training.progress import Lines

SAMPLERS, PRUNERS = ("tpe", "random", "grid"), ("hyperband", "none")


@dataclass(frozen=True)
class Range:
    """What is searched of one option: `choices`, or all from `low` to `high`, evenly or (`log`) evenly in logarithm."""

    name: str
    kind: type
    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False

    def suggest(self, trial: Any) -> Any:
        """The value that an Optuna trial takes."""
        if self.choices:
            return trial.suggest_categorical(self.name, self.choices)
        if self.kind is int:
            return trial.suggest_int(self.name, int(self.low), int(self.high), log=self.log)
        return trial.suggest_float(self.name, self.low, self.high, log=self.log)


def _value(name: str, kind: type, text: str) -> Any:
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        return kind(float(text)) if kind is int and float(text).is_integer() else kind(text)
    except (ValueError, KeyError, OverflowError):
        noun = {int: "whole numbers", float: "numbers", bool: "true or false"}[kind]
        raise ValueError(f"--search {name}: must be {noun}, got {text!r}") from None


def read_range(text: str) -> Range:
    """NAME=A,B,C (these values), NAME=LOW:HIGH (all between) or NAME=LOW:HIGH:log.

    Raises:
        ValueError: an unknown option, or values of another kind.
    """
    name, equals, values = text.partition("=")
    known = {o.name: o.metadata["kind"] for o in options() if o.metadata["group"] != "life cycle"}
    if not equals or not values:
        raise ValueError(f"--search must be NAME=A,B,C or NAME=LOW:HIGH or NAME=LOW:HIGH:log, got {text!r}")
    name = validation.choose("option to search", name.strip().lstrip("-").replace("-", "_"), known)
    kind = known[name]
    if ":" not in values:
        choices = (_value(name, kind, part.strip()) for part in values.split(","))
        return Range(name, kind, tuple(dict.fromkeys(choices)))
    parts = values.split(":")
    if kind not in (int, float) or len(parts) > 3 or (len(parts) == 3 and parts[2] != "log"):
        raise ValueError(f"--search {name}: a range is LOW:HIGH or LOW:HIGH:log and of numbers, got {values!r}")
    low, high = (_value(name, kind, part) for part in parts[:2])
    log = len(parts) == 3
    if not (math.isfinite(low) and low < high < math.inf) or (log and low <= 0):
        raise ValueError(f"--search {name}: must rise{' from above 0' if log else ''}, got {values!r}")
    return Range(name, kind, (), low, high, log)


class _Pruned(Exception):
    """A trial that is worse than others at the same step."""


class _Report(Lines):
    """Tells a trial of every evaluation, and ends it when the study has seen enough."""

    def __init__(self, trial: Any, steps: int):
        super().__init__(steps, log=lambda line: None)
        self.trial = trial
        self.accuracy: float | None = None

    def show(self, row: dict[str, Any]) -> None:
        """Passes on an evaluation."""
        if row.get("test_accuracy") is None:
            return
        self.accuracy = row["test_accuracy"]
        self.trial.report(self.accuracy, row["step"])
        if row["step"] < self.steps and self.trial.should_prune():
            raise _Pruned


def open_study(
    name: str, storage: pathlib.Path, sampler: str, pruner: str, base: Recipe, space: Sequence[Range], seed: int
) -> Any:
    """An Optuna study in an SQLite file, new or to go on with; trials that a kill left unfinished count as failed.

    Args:
        base: recipe of all trials, with its budget.

    Raises:
        ValueError: the study there has another recipe or search.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage.parent.mkdir(parents=True, exist_ok=True)
    chosen = optuna.pruners.NopPruner()
    if pruner == "hyperband":
        chosen = optuna.pruners.HyperbandPruner(min_resource=base.eval_every, max_resource=base.steps)
    study = optuna.create_study(
        storage=f"sqlite:///{storage.resolve()}",
        study_name=name,
        direction="maximize",
        load_if_exists=True,
        pruner=chosen,
    )
    kind = optuna.samplers.TPESampler if sampler == "tpe" else optuna.samplers.RandomSampler
    # Another seed at each start, or the same values would be drawn again.
    study.sampler = kind(seed=seed + len(study.get_trials(deepcopy=False)))
    searched = [dataclasses.asdict(part) | {"kind": part.kind.__name__} for part in space]
    now = {"recipe": dataclasses.asdict(base), "space": searched, "sampler": sampler, "pruner": pruner}
    before = study.user_attrs.get("fastcifar")
    if before is None:
        study.set_user_attr("fastcifar", now)
    elif changed := _changes(before, now):
        raise ValueError(f"{storage} holds a study {name!r} with other options ({changed}); give another --study")
    for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    return study


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    found = recipe.differences(before["recipe"], now["recipe"])
    for old, new, keys in (
        (before, now, ("sampler", "pruner")),
        (before["recipe"], now["recipe"], ("backbone", "init_weights", "teacher")),
    ):
        found += [f"{key}: {old.get(key)} → {new.get(key)}" for key in keys if old.get(key) != new.get(key)]
    old, new = (
        {part["name"]: {**part, "choices": list(part["choices"])} for part in x["space"]} for x in (before, now)
    )
    return "; ".join([*found, *(f"--search {name}" for name in sorted({*old, *new}) if old.get(name) != new.get(name))])


class Search:
    """Runs trials of a study.

    Args:
        base: recipe of all trials.
        space: what differs between them.
        grid: run every combination of the choices.
        dataset: with the held-out images as its test images.
    """

    def __init__(
        self,
        study: Any,
        base: Recipe,
        space: Sequence[Range],
        dataset: data.ImageDataset,
        device: torch.device,
        *,
        grid: bool = False,
    ):
        self.study, self.base, self.space, self.dataset, self.device = study, base, space, dataset, device
        self.grid = grid
        self._put_first_weights = transfer.first_weights(base, None)

    def finished(self) -> list[Any]:
        """The study's trials that ended by themselves or were pruned."""
        from optuna.trial import TrialState

        return self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))

    def run(self, trials: int, notify: Callable[[str], None]) -> None:
        """Trains until the study has so many finished trials.

        Raises:
            Stopped: by a signal; the trial at hand counts as failed.
            ValueError: values that do not go together.
        """
        while len(self.finished()) < trials:
            if self.grid:
                self.study.enqueue_trial(self._next_of_grid())
            notify(self._trial())

    def _next_of_grid(self) -> dict[str, Any]:
        done = [trial.params for trial in self.finished()]
        names = [part.name for part in self.space]
        combinations = (dict(zip(names, x, strict=True)) for x in itertools.product(*(p.choices for p in self.space)))
        return next(values for values in combinations if values not in done)

    def _trial(self) -> str:
        from optuna.trial import TrialState

        trial = self.study.ask()
        try:
            values = {part.name: part.suggest(trial) for part in self.space}
            chosen = recipe.resolve({**dataclasses.asdict(self.base), **values}, has_gpu=False)
            chosen = recipe.with_budget(chosen, len(self.dataset.train_images))
            report = _Report(trial, chosen.steps)
            task = Classification(chosen, self.dataset, self.device, distributed.Processes())
            self._put_first_weights(task)
            train_loop = Loop(task, None, report, distributed.Processes())
            state, note = self._train(train_loop)
        except BaseException:
            self.study.tell(trial, state=TrialState.FAIL)
            raise
        accuracy = report.accuracy
        trial.set_user_attr("steps", train_loop.step)
        trial.set_user_attr("seconds", round(train_loop.seconds, 1))
        self.study.tell(trial, accuracy if state == TrialState.COMPLETE else None, state)
        if train_loop.signal:  # it came too late to end this trial
            raise Stopped(train_loop.signal, train_loop.step)
        reached = "no evaluation" if accuracy is None else f"{accuracy:.2f} %"
        return f"trial {trial.number}: {reached}{note} · {describe(values)} · {train_loop.seconds:.0f} s"

    @staticmethod
    def _train(train_loop: Loop) -> tuple[Any, str]:
        from optuna.trial import TrialState

        try:
            train_loop.run()
        except _Pruned:
            return TrialState.PRUNED, f", pruned at step {train_loop.step}"
        except NotFinite:
            return TrialState.PRUNED, f", not finite at step {train_loop.step}"
        return TrialState.COMPLETE, ""

    def rows(self) -> list[dict[str, Any]]:
        """The finished trials, best first: number, accuracy, steps, seconds, and the searched options."""
        from optuna.trial import TrialState

        rows = []
        for trial in self.finished():
            reported = trial.intermediate_values
            accuracy = reported[max(reported)] if reported else None
            facts = {"trial": trial.number, "accuracy": accuracy, **trial.user_attrs}
            rows.append(facts | {"pruned": trial.state == TrialState.PRUNED, **trial.params})
        return sorted(rows, key=lambda row: (row["pruned"], -(row["accuracy"] or 0.0)))


def describe(values: Mapping[str, Any]) -> str:
    """Options as one would type them."""
    return " ".join(f"{flag(name)} {value:.4g}" if isinstance(value, float) else f"{flag(name)} {value}"
                    for name, value in values.items())  # fmt: skip
