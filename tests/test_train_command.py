"""`python -m fastcifar.train` and `evaluate`, `doctor` as a user runs them."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy
import pytest
from training_case import TINY, result_of, status_of, write_tiny

from fastcifar import doctor, evaluate, train
from fastcifar.data.synthetic import synthetic
from fastcifar.training import checkpoint, trained

FIELDS = {
    "model", "dataset", "synthetic", "preset", "seed", "steps", "seconds", "images_per_second", "train_accuracy",
    "test_accuracy", "train_loss", "state_sha256",
}  # fmt: skip
FILES = {
    "checkpoints",
    "config.yaml",
    "curves.png",
    "env.json",
    "log.txt",
    "metrics.csv",
    "metrics.jsonl",
    "result.json",
}


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FASTCIFAR_DATA", raising=False)
    return write_tiny(tmp_path / "tiny.npz")


def start(source, *arguments):
    return [*TINY, "--dataset", source, *arguments]


def test_a_run_leaves_its_folder_and_its_result(source, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert status_of(start(source, "--steps", 12, "--save-every", 5, "--eval-every", 4, "--tta")) == 0
    result = result_of(capsys)
    assert set(result) >= FIELDS | {"test_accuracy_tta"} and not result["synthetic"]
    (run,) = (tmp_path / "runs").iterdir()
    assert {path.name for path in run.iterdir()} == FILES
    assert json.loads((run / "result.json").read_text()) == result
    assert [p.name for p in checkpoint.list_checkpoints(run / "checkpoints")] == ["step-00000012", "step-00000010"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [row["step"] for row in rows if "test_accuracy" in row] == [4, 8, 12]
    with open(run / "metrics.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [float(row["train_loss"]) for row in table] == [row["train_loss"] for row in rows]
    environment = json.loads((run / "env.json").read_text())
    assert {"versions", "hardware", "settings", "native_module", "implementations"} <= set(environment)
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "step 12/12" in (run / "log.txt").read_text()


def test_the_runs_own_configuration_repeats_it(source, tmp_path, capsys):
    pytest.importorskip("yaml")
    assert status_of(start(source, "--steps", 6, "--output", "first", "--seed", 3, "--mixup", 0.2)) == 0
    first = result_of(capsys)
    assert status_of(["--config", "first/config.yaml", "--output", "second"]) == 0
    assert result_of(capsys)["state_sha256"] == first["state_sha256"]


def test_stopping_and_going_on_gives_the_same_result(source, tmp_path, capsys, monkeypatch):
    arguments = start(source, "--steps", 12, "--save-every", 5, "--model-ema-decay", 0.9)
    assert status_of([*arguments, "--output", "whole"]) == 0
    whole = result_of(capsys)
    original = train.Classification.train_step

    def interrupted(self, step):
        original(self, step)
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train.Classification, "train_step", interrupted)
    assert status_of([*arguments, "--output", "parts"]) == 128 + signal.SIGTERM
    assert checkpoint.find("parts", print).step == 7
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert status_of(["--resume", "auto", "--output", "parts"]) == 0
    resumed = result_of(capsys)
    assert resumed["state_sha256"] == whole["state_sha256"] and resumed["resumed_at"] == 7
    rows = [json.loads(line) for line in open("parts/metrics.jsonl")]
    assert [row["step"] for row in rows] == list(range(1, 13))
    wholes = [json.loads(line)["train_loss"] for line in open("whole/metrics.jsonl")]
    assert [row["train_loss"] for row in rows] == wholes


@pytest.mark.parametrize("resume", [["--resume", "run"], ["--resume", "auto", "--output", "run"]], ids=["path", "auto"])
def test_going_on_with_other_options_is_refused_by_name(resume, source, capsys):
    assert status_of(start(source, "--steps", 4, "--output", "run")) == 0
    capsys.readouterr()
    assert status_of([*resume, "--lr", 0.9, "--seed", 5]) == 2
    message = capsys.readouterr().err
    assert "lr: 0.4 → 0.9" in message and "seed: 0 → 5" in message and len(message.splitlines()) == 1


def test_resume_auto_without_a_run_starts_one(source, capsys):
    assert status_of(start(source, "--steps", 2, "--output", "new", "--resume", "auto")) == 0
    assert result_of(capsys)["resumed_at"] == 0


def test_nothing_is_overwritten(source, capsys):
    assert status_of(start(source, "--steps", 2, "--output", "run")) == 0
    before = checkpoint.find("run", print).path.stat().st_mtime_ns
    assert status_of(start(source, "--steps", 3, "--output", "run")) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert checkpoint.find("run", print).path.stat().st_mtime_ns == before
    assert status_of(start(source, "--steps", 2)) == status_of(start(source, "--steps", 2)) == 0
    assert len(os.listdir("runs")) == 2


def test_a_damaged_checkpoint_is_passed_over(source, capsys):
    assert status_of(start(source, "--steps", 9, "--save-every", 4, "--output", "run")) == 0
    expected = result_of(capsys)["state_sha256"]
    newest = checkpoint.list_checkpoints(checkpoint.pathlib.Path("run/checkpoints"))[0]
    (newest / "state.safetensors").write_bytes(b"")
    assert status_of(["--resume", "auto", "--output", "run"]) == 0
    captured = capsys.readouterr()
    assert "damaged" in captured.err
    result = json.loads(captured.out.splitlines()[-1])
    assert result["state_sha256"] == expected and result["resumed_at"] == 8


def test_first_weights_and_evaluation_only(source, capsys):
    assert status_of(start(source, "--steps", 20, "--lr", 0.1, "--output", "run")) == 0
    trained = result_of(capsys)
    assert status_of(start(source, "--eval-only", "--init-weights", "run", "--output", "again")) == 0
    again = result_of(capsys)
    assert again["test_accuracy"] == trained["test_accuracy"] and again["steps"] == 0
    assert not os.path.exists("again/checkpoints")


def test_evaluating_an_older_checkpoint_leaves_the_run_as_it_is(source, tmp_path, capsys):
    assert status_of(start(source, "--steps", 12, "--save-every", 5, "--output", "run")) == 0
    names = ("metrics.jsonl", "metrics.csv", "config.yaml", "env.json", "result.json", "curves.png")
    before = {name: (tmp_path / "run" / name).read_bytes() for name in names if (tmp_path / "run" / name).exists()}
    assert status_of(["--resume", "run/checkpoints/step-00000010", "--eval-only"]) == 0
    assert result_of(capsys)["steps"] == 10
    assert {name: (tmp_path / "run" / name).read_bytes() for name in before} == before


def test_a_checkpoint_that_does_not_fit_costs_no_row(source, tmp_path, monkeypatch, capsys):
    assert status_of(start(source, "--steps", 6, "--save-every", 5, "--output", "run")) == 0
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    saved = checkpoint.load(tmp_path / "run/checkpoints/step-00000005")
    saved.tensors.popitem()
    checkpoint.save(tmp_path / "run/checkpoints", 5, saved.tensors, saved.state)
    capsys.readouterr()
    assert status_of(["--resume", "run/checkpoints/step-00000005"]) == 2
    assert "lacks" in capsys.readouterr().err
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before


def test_dry_run_shows_all_and_writes_nothing(source, tmp_path, capsys):
    assert status_of(start(source, "-n", "--epochs", 3)) == 0
    shown = capsys.readouterr().out
    assert "steps: 19" in shown and "parameters: " in shown and "estimated time: " in shown
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny.npz"]


def test_synthetic_stands_in_and_says_so(source, capsys, monkeypatch):
    monkeypatch.setattr(train.data, "load_dataset", lambda *arguments, **options: synthetic(200, 100))
    assert status_of([*TINY, "--steps", 1]) == 0
    output = capsys.readouterr().out
    assert "SYNTHETIC" in output.splitlines()[0]
    result = json.loads(output.splitlines()[-1])
    assert result["synthetic"] and "SYNTHETIC" in result["notices"][0]


def test_a_missing_package_is_one_line_that_installs_it(source, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert status_of(start(source, "--wandb")) == 2
    assert "pip install 'fastcifar[wandb]'" in capsys.readouterr().err and not os.path.exists("runs")


def test_an_unknown_flag_gets_the_nearest(source, capsys):
    assert status_of(["--weight-decey", "1"]) == 2
    assert "did you mean --weight-decay?" in capsys.readouterr().err


class FakeService:
    """Stands for a tracking package: remembers what it is given."""

    def __init__(self):
        self.rows = []

    def init(self, **options):
        assert options["config"]["steps"] == 3
        return self

    def log(self, values, step):
        self.rows.append((step, values["train_loss"]))


def test_rows_go_to_a_tracking_service_too(source, monkeypatch):
    service = FakeService()
    monkeypatch.setitem(sys.modules, "wandb", service)
    assert status_of(start(source, "--steps", 3, "--wandb", "--output", "run")) == 0
    rows = [json.loads(line) for line in open("run/metrics.jsonl")]
    assert service.rows == [(row["step"], row["train_loss"]) for row in rows]


def test_debug_shows_the_traceback(source):
    with pytest.raises(ValueError, match="unknown model"):
        status_of(["--model", "x", "--debug"])


def test_a_module_run_ends_with_status_2_and_no_traceback(source):
    command = [sys.executable, "-m", "fastcifar.train", "--lr", "-1"]
    end = subprocess.run(command, capture_output=True, text=True)
    assert end.returncode == 2 and end.stderr == "python -m fastcifar.train: error: --lr must be ≥ 0, got -1.0\n"


def evaluated(arguments):
    return status_of(arguments, evaluate.main, "python -m fastcifar.evaluate")


def test_evaluate_agrees_with_training(source, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert status_of(start(source, "--steps", 30, "--lr", 0.1, "--model-ema-decay", 0.5, "--output", "run")) == 0
    trained = result_of(capsys)
    assert evaluated(["--checkpoint", "run", "--amp-dtype", "fp32", "--tta"]) == 0
    result = result_of(capsys)
    assert result["accuracy"] == trained["test_accuracy"] and result["step"] == 30
    report = json.loads((tmp_path / "run/evaluation.json").read_text())
    matrix = report["confusion"]
    assert sum(map(sum, matrix)) == 40
    diagonal = sum(row[i] for i, row in enumerate(matrix))
    assert 100 * diagonal / 40 == pytest.approx(result["accuracy"])
    assert report["accuracy_by_class"]["class 0"] == pytest.approx(100 * matrix[0][0] / sum(matrix[0]), abs=1e-3)
    assert (tmp_path / "run/confusion.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments",
    [[], ["--checkpoint", "absent"], ["--checkpoint", ".", "--split", "tests"], ["--checkpoint", "."], ["--tt"]],
    ids=["none", "absent", "split", "no checkpoint", "flag"],
)
def test_evaluate_refuses_in_one_line(arguments, source, capsys):
    assert evaluated(arguments) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_evaluate_refuses_another_number_of_classes(source, tmp_path, capsys):
    assert status_of(start(source, "--steps", 1, "--output", "run")) == 0
    other = write_tiny(tmp_path / "other.npz", classes=3)
    capsys.readouterr()
    assert evaluated(["--checkpoint", "run", "--dataset", other]) == 2
    assert "holds another network" in capsys.readouterr().err


def test_doctor_reports(source, capsys):
    assert status_of([], doctor.main, "python -m fastcifar.doctor") == 0
    report = capsys.readouterr().out
    for word in ("torch", "native module", "GPU", "cifar100", "depthwise_conv_bn_act", "reference"):
        assert word in report
    assert "What to do:" in report or "Everything is in place." in report


def test_a_run_by_epochs_goes_on_by_its_own_command(source, tmp_path, capsys):
    arguments = start(source, "--epochs", 2, "--output", "run", "--resume", "auto")
    assert status_of(arguments) == 0
    first = result_of(capsys)
    assert first["steps"] == 13  # 2 epochs of 100 images, 16 a step
    assert status_of(arguments) == 0
    assert result_of(capsys)["state_sha256"] == first["state_sha256"]
    (tmp_path / "options.yaml").write_text("epochs: 2\n")
    assert status_of(["--config", "options.yaml", "--output", "run", "--resume", "auto"]) == 0
    capsys.readouterr()
    assert status_of(["--output", "run", "--resume", "auto", "--epochs", 3]) == 2
    error = capsys.readouterr().err
    assert "a run of 13 steps, --epochs asks for 19" in error and len(error.splitlines()) == 1
    assert status_of(["--output", "run", "--resume", "auto", "--steps", 14]) == 2


def test_a_resumed_run_still_knows_its_first_weights(source, capsys):
    assert status_of(start(source, "--steps", 2, "--output", "first")) == 0
    arguments = start(source, "--steps", 4, "--init-weights", "first", "--output", "run")
    assert status_of(arguments) == 0 and status_of(["--resume", "run"]) == 0
    assert checkpoint.find("run", print).config["init_weights"] == "first"


def test_a_network_sees_other_images_as_it_saw_its_own(source, tmp_path, capsys):
    assert status_of(start(source, "--steps", 2, "--output", "run")) == 0
    arrays = dict(numpy.load(source.partition(":")[2]))
    darker = {name: array // 2 if "images" in name else array for name, array in arrays.items()}
    numpy.savez(tmp_path / "dark.npz", **darker)
    own = trained.load_classifier("run").dataset
    other = trained.load_classifier("run", f"npz:{tmp_path}/dark.npz").dataset
    assert (other.mean, other.std) == (own.mean, own.std) and other.train_images.mean() < own.train_images.mean() * 0.6
    # To train on, they would be another run's.
    (tmp_path / "dark.npz").replace(source.partition(":")[2])
    capsys.readouterr()
    assert status_of(["--resume", "run"]) == 2
    assert "was trained on other images" in capsys.readouterr().err


def test_a_run_does_not_go_on_in_the_folder_of_another(source, tmp_path, capsys):
    assert status_of(start(source, "--steps", 6, "--save-every", 5, "--output", "one")) == 0
    assert status_of(start(source, "--steps", 3, "--seed", 2, "--output", "two")) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "two").rglob("*") if path.is_file()}
    capsys.readouterr()
    arguments = ["--resume", "one/checkpoints/step-00000005"]
    assert status_of([*arguments, "--output", "two"]) == 2
    assert "--output two already holds a run" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "two").rglob("*") if path.is_file()} == before
    assert status_of([*arguments, "--output", "three"]) == 0
    # The same command, started again by a scheduler, goes on with what it made.
    saved = checkpoint.find("three", print).step
    capsys.readouterr()
    assert status_of([*arguments, "--output", "three"]) == 0 and result_of(capsys)["resumed_at"] == saved == 6
    assert status_of([*arguments, "--output", tmp_path / "one"]) == 0


def test_evaluating_without_a_checkpoint_is_refused(source, capsys):
    assert status_of(start(source, "--eval-only", "--resume", "auto", "--output", "runs/tpyo")) == 2
    assert "no checkpoint in runs/tpyo" in capsys.readouterr().err and not os.path.exists("runs/tpyo")


def test_a_job_script_with_first_weights_may_be_started_again(source, capsys):
    assert status_of(start(source, "--steps", 2, "--output", "first")) == 0
    arguments = start(source, "--steps", 6, "--save-every", 4, "--init-weights", "first", "--output", "run")
    assert status_of([*arguments, "--resume", "auto"]) == 0
    whole = result_of(capsys)
    shutil.rmtree("run/checkpoints/step-00000006")
    assert status_of([*arguments, "--resume", "auto"]) == 0
    again = result_of(capsys)
    assert (again["resumed_at"], again["state_sha256"]) == (4, whole["state_sha256"])
    assert checkpoint.find("run", print).config["init_weights"] == "first"


def test_weights_that_know_the_held_out_images_are_warned_of(source, capsys):
    assert status_of(start(source, "--steps", 1, "--output", "all")) == 0
    assert status_of(start(source, "--steps", 1, "--holdout", 20, "--output", "some")) == 0
    for option in ("--init-weights", "--teacher", "--backbone"):
        for run, warned in (("all", True), ("some", False)):
            capsys.readouterr()
            place = f"{option.strip('-')}-{run}"
            assert status_of(start(source, "--steps", 1, "--holdout", 20, option, run, "--output", place)) == 0
            assert (f"WARNING: {option} {run}/checkpoints" in capsys.readouterr().out) == warned


def test_a_tracking_service_that_fails_ends_nothing(source, monkeypatch, capsys):
    class Broken(FakeService):
        def log(self, values, step):
            raise OSError(28, "No space left on device")

    monkeypatch.setitem(sys.modules, "wandb", Broken())
    assert status_of(start(source, "--steps", 3, "--eval-every", 1, "--wandb", "--output", "run")) == 0
    assert capsys.readouterr().out.count("a tracker failed and gets no more metrics (OSError") == 1
