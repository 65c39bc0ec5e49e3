"""Searches over a recipe's options, interrupted and gone on with."""

import json
import os
import signal

import pytest
import torch
from training_case import TINY, result_of, status_of, write_tiny

from fastcifar import train, tune
from fastcifar.training import checkpoint, run_folder, search

optuna = pytest.importorskip("optuna", reason="tuning needs optuna: pip install 'fastcifar[tune]'")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_tiny(tmp_path / "tiny.npz")


def tuned(source, *arguments):
    common = [*TINY, "--dataset", source, "--steps", 4, "--storage", "t.db", "--study", "s", *arguments]
    return status_of(common, tune.main, "python -m fastcifar.tune")


def trials():
    return optuna.load_study(storage="sqlite:///t.db", study_name="s").trials


def test_a_grid_runs_every_combination_once(source, tmp_path, capsys):
    grid = ["--sampler", "grid", "--pruner", "none", "--search", "lr=0.01,0.1", "--search", "opt=sgd,adam"]
    assert tuned(source, *grid, "--trials", 3) == 0
    assert result_of(capsys)["finished"] == 3
    assert tuned(source, *grid) == 0
    output = capsys.readouterr().out
    result = json.loads(output.strip().splitlines()[-1])
    assert "3 of 4 trials done" in output and result["finished"] == 4
    assert result["dataset"] == f"{source}-holdout10"
    found = {(trial.params["lr"], trial.params["opt"]) for trial in trials()}
    assert found == {(lr, opt) for lr in (0.01, 0.1) for opt in ("sgd", "adam")} and len(trials()) == 4
    stored = json.loads((tmp_path / "s" / "result.json").read_text())
    accuracies = [row["accuracy"] for row in stored["trials"]]
    assert accuracies == sorted(accuracies, reverse=True) and stored["best_accuracy"] == accuracies[0]
    # The same command as --config trains with the best options, on all images.
    assert status_of(["--config", "s/best.yaml", "--output", "best"]) == 0
    config = json.loads("{" + ",".join(f'"{a}": {b}' for a, b in lines("best/config.yaml")) + "}")
    assert config["holdout"] == 0 and {key: config[key] for key in stored["best"]} == stored["best"]


def lines(path):
    with open(path) as file:
        return [line.rstrip().split(": ", 1) for line in file]


def test_an_interrupted_search_goes_on(source, monkeypatch, capsys):
    search_options = ["--search", "lr=0.01:1:log", "--search", "warmup_steps=0:3", "--trials", 3]
    original, calls = train.Classification.train_step, []

    def interrupted(self, step):
        original(self, step)
        calls.append(step)
        if len(calls) == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train.Classification, "train_step", interrupted)
    assert tuned(source, *search_options) == 128 + signal.SIGTERM
    assert "the same command goes on" in capsys.readouterr().out
    # A kill leaves a trial that is still running.
    optuna.load_study(storage="sqlite:///t.db", study_name="s").ask()
    assert tuned(source, *search_options) == 0
    states = [trial.state.name for trial in trials()]
    assert states.count("FAIL") == 2 and states.count("RUNNING") == 0
    assert states.count("COMPLETE") + states.count("PRUNED") == 3 == result_of(capsys)["finished"]
    values = [trial.params["lr"] for trial in trials() if trial.params]
    assert len(set(values)) == len(values) and all(0.01 <= value <= 1 for value in values)
    assert tuned(source, *search_options, "--seed", 4) == 2
    assert "seed: 0 → 4" in capsys.readouterr().err


def test_bad_trials_end_early(source, capsys, monkeypatch):
    def row(self):
        return {"test_loss": 1.0, "test_accuracy": 50.0 if self.recipe.lr > 0.01 else 10.0}

    monkeypatch.setattr(train.Classification, "evaluation_row", row)
    assert tuned(source, "--search", "lr=0.05,1e-9", "--trials", 8, "--eval-every", 1) == 0
    rows = json.loads(open("s/result.json").read())["trials"]
    pruned = [row for row in rows if row["pruned"]]
    assert pruned and all(row["steps"] < 4 and row["lr"] == 1e-9 for row in pruned)
    assert all(row["steps"] == 4 for row in rows if not row["pruned"])
    assert result_of(capsys)["best"] == {"lr": 0.05}


def test_a_trial_that_diverges_is_pruned(source, capsys):
    assert tuned(source, "--sampler", "grid", "--search", "lr=0.05,1e38", "--pruner", "none") == 0
    assert "not finite" in capsys.readouterr().out
    assert [trial.state.name for trial in trials()].count("PRUNED") == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lr=0.1:2:log", search.Range("lr", float, (), 0.1, 2.0, True)),
        ("--weight-decay=0:1", search.Range("weight_decay", float, (), 0.0, 1.0, False)),
        ("warmup_steps=1e2:400", search.Range("warmup_steps", int, (), 100, 400, False)),
        ("hflip=off,random", search.Range("hflip", str, ("off", "random"))),
        ("compile=true,false", search.Range("compile", bool, (True, False))),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_ranges(text, expected):
    assert search.read_range(text) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to search"),
        (["--search", "lr"], "must be NAME=A,B,C"),
        (["--search", "lrr=1,2"], "did you mean 'lr'"),
        (["--search", "lr=2:1"], "must rise"),
        (["--search", "lr=0:1:log"], "must rise from above 0"),
        (["--search", "opt=sgd:adam"], "a range is LOW:HIGH"),
        (["--search", "opt=sgd,adan"], "did you mean 'adam'"),
        (["--search", "lr=a,b"], "must be numbers"),
        (["--search", "lr=0:1", "--search", "lr=1,2"], "names an option twice"),
        (["--search", "model=ds_resnet,ds_resnet_x2"], "must be the same for all trials"),
        (["--search", "lr=0:1", "--sampler", "grid"], "--sampler grid needs values"),
        (["--search", "lr=0:1", "--trials", "0"], "--trials must be ≥ 1"),
        (["--search", "lr=0.1,1", "--pruner", "median"], "unknown --pruner"),
        (["--search", "lr=0.1,1", "--model", "dcgan"], "is a GAN"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line(source, capsys, arguments, message):
    assert tuned(source, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def test_trials_begin_with_the_weights_of_the_command_line(source, capsys, monkeypatch):
    assert status_of([*TINY, "--dataset", source, "--steps", "3", "--output", "first"]) == 0
    first = checkpoint.find("first", print).tensors["model.stem.conv.weight"]
    original, seen = train.Classification.train_step, []

    def step(self, number):
        if number == 0:
            seen.append(self.model.stem.conv.weight.detach().clone())
        original(self, number)

    monkeypatch.setattr(train.Classification, "train_step", step)
    options = ["--search", "lr=0.01,0.1", "--trials", 2]
    assert tuned(source, *options, "--init-weights", "first") == 0
    assert len(seen) == 2 and all(torch.equal(weight, first) for weight in seen)
    capsys.readouterr()
    assert tuned(source, *options) == 2
    assert "init_weights: first → None" in capsys.readouterr().err


def test_one_process_at_a_time_searches_a_study(source, tmp_path, capsys):
    with run_folder.claimed(tmp_path / "s"):
        assert tuned(source, "--search", "lr=0.01,0.1", "--trials", 1) == 2
    assert "another process" in capsys.readouterr().err
    assert tuned(source, "--search", "lr=0.01,0.1", "--trials", 1) == 0


def test_a_signal_in_the_last_step_of_a_trial_ends_the_search(source, capsys, monkeypatch):
    def row(self):
        os.kill(os.getpid(), signal.SIGTERM)
        return {"test_loss": 1.0, "test_accuracy": 50.0}

    monkeypatch.setattr(train.Classification, "evaluation_row", row)
    assert tuned(source, "--search", "lr=0.01,0.1", "--trials", 3, "--pruner", "none", "--eval-every", 4) == 143
    assert [trial.state.name for trial in trials()] == ["COMPLETE"]


def test_a_value_that_is_given_twice_is_tried_once(source, capsys):
    assert tuned(source, "--sampler", "grid", "--search", "lr=0.1,0.1", "--pruner", "none") == 0
    assert result_of(capsys)["finished"] == 1
    assert tuned(source, "--search", "preset=demo,fast") == 2
    assert "must be the same for all trials" in capsys.readouterr().err
