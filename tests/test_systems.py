"""The table of published systems says which recipe a stored run followed, and what was not measured."""

import copy
import statistics

import pytest
from training_case import TINY, status_of, write_tiny

from benchmarks import keep, systems
from fastcifar.training import recipe

RUNS = systems.runs()
PLAIN = next(run for run in RUNS if run["config"]["preset"] == "fast")


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run['result']['model']}-{run['result']['preset']}")
def test_a_stored_run_can_be_repeated(run):
    result, config = run["result"], run["config"]
    assert (result["steps"], result["seed"], result["batch_size"]) == tuple(
        config[key] for key in ("steps", "seed", "batch_size")
    )
    assert recipe.Recipe(**config).preset == result["preset"] and len(result["state_sha256"]) == 64
    assert not any(str(value).startswith("/") for value in (*config.values(), *run["env"]["command"]))


def test_a_recipe_is_its_preset_and_what_differs_from_it():
    run = copy.deepcopy(PLAIN)
    preset = f"`{run['config']['preset']}`"
    assert systems.recipe(run) == preset
    run["config"].update(lr=0.123, tta=not run["config"]["tta"])
    assert systems.recipe(run) == f"{preset} `--lr 0.123`"


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("config", {"teacher": "big"}, "`--teacher big`"),
        ("config", {"init_weights": "first"}, "`--init-weights first`"),
        ("result", {"dataset": "cifar10"}, "`--dataset cifar10`"),
    ],
    ids=["teacher", "first weights", "data set"],
)
def test_another_experiment_is_another_row(part, change, words):
    run = copy.deepcopy(PLAIN)
    plain = systems.recipe(run)
    run[part].update(change)
    assert systems.recipe(run) == f"{plain} {words}"


def test_seeds_are_one_row_and_the_unmeasured_say_so(monkeypatch):
    run = copy.deepcopy(next(run for run in RUNS if run["result"]["model"] == "ds_resnet"))
    other, longer = copy.deepcopy(run), copy.deepcopy(run)
    run["result"]["test_accuracy"], other["result"]["test_accuracy"] = 50.0, 53.0
    for part in ("result", "config"):
        other[part]["seed"], longer[part]["steps"] = 1, 9_999
    longer["config"]["warmup_steps"] = 2_000
    monkeypatch.setattr(systems, "runs", lambda: [run, other, longer])
    first, second, *rest = systems.rows()
    assert first["steps"].startswith("9,999") and first["seeds"] == 1
    assert second["seeds"] == 2
    assert second["test accuracy"] == f"51.5 ± {statistics.stdev([50.0, 53.0]):.1f} %"
    assert [row["here"] for row in rest] == ["not measured"] * (len(systems.CLASSIFIERS) - 1)


def test_keeping_a_run(tmp_path, monkeypatch, capsys):
    source = write_tiny(tmp_path / "tiny.npz")
    assert status_of([*TINY, "--dataset", source, "--steps", "2", "--output", tmp_path / "run"]) == 0
    capsys.readouterr()
    monkeypatch.setattr(keep.reporting, "RESULTS", tmp_path)
    keep.main(str(tmp_path / "run"))
    kept = systems.json.loads((tmp_path / "run-ds_resnet-demo-2-seed0.json").read_text())
    assert kept["config"]["output"] == "run" and kept["config"]["steps"] == kept["result"]["steps"] == 2
    assert str(tmp_path) not in str(kept["config"])
    other = tmp_path / "other" / "run"
    assert status_of([*TINY, "--dataset", source, "--steps", "2", "--lr", "0.2", "--output", other]) == 0
    with pytest.raises(SystemExit, match="holds a run with other options"):
        keep.main(str(other))
