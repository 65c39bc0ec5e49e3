"""Checkpoints of every format that was ever written can be gone on from, evaluated and drawn with.

`fixtures/format-N` holds a tiny classifier and a tiny DCGAN as the version that wrote format N left them.
"""

import json
import pathlib
import shutil

import pytest
from training_case import result_of, status_of, write_tiny

from fastcifar import evaluate, generate
from fastcifar.training import checkpoint

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
FORMATS = sorted(path.name for path in FIXTURES.glob("format-*"))
STEPS = {"classifier": 4, "gan": 2}


@pytest.fixture(params=[(form, kind) for form in FORMATS for kind in STEPS], ids="-".join)
def run(request, tmp_path, monkeypatch, no_curves, one_thread):
    """A run folder with one old checkpoint, in the working folder of its data."""
    form, kind = request.param
    monkeypatch.chdir(tmp_path)
    write_tiny("tiny.npz")
    write_tiny("tiny32.npz", size=32)
    shutil.copytree(FIXTURES / form / kind, tmp_path / kind / "checkpoints" / f"step-{STEPS[kind]:08d}")
    return kind


def test_every_format_has_its_fixtures():
    assert FORMATS == [f"format-{number}" for number in range(1, checkpoint.FORMAT + 1)]
    for form in FORMATS:
        for kind, step in STEPS.items():
            note = json.loads((FIXTURES / form / kind / "checkpoint.json").read_text())
            assert (f"format-{note['format']}", note["step"]) == (form, step)


def test_an_old_checkpoint_goes_on_to_the_end(run, capsys):
    old = checkpoint.find(run, notify=pytest.fail)
    assert status_of(["--resume", "auto", "--output", run]) == 0
    result = result_of(capsys)
    assert result["resumed_at"] == STEPS[run] and result["steps"] == 2 * STEPS[run]
    new = checkpoint.find(run, notify=pytest.fail)
    assert json.loads((new.path / "checkpoint.json").read_text())["format"] == checkpoint.FORMAT
    assert new.tensors.keys() == old.tensors.keys()
    assert (pathlib.Path(run) / "checkpoints" / f"step-{STEPS[run]:08d}").is_dir()


def test_an_old_checkpoint_is_evaluated_or_drawn_with(run, capsys):
    main = evaluate.main if run == "classifier" else generate.main
    assert status_of(["--checkpoint", run], main) == 0
    assert result_of(capsys)["step"] == STEPS[run]


def test_a_migration_changes_no_tensor():
    loaded = [[checkpoint.load(FIXTURES / form / kind).tensors for form in FORMATS] for kind in STEPS]
    for versions in loaded:
        assert len({checkpoint.state_sha256(tensors) for tensors in versions}) == 1


@pytest.mark.parametrize("number", [0, -1, "1", 1.0, True, None, checkpoint.FORMAT + 1], ids=repr)
def test_an_unknown_format_is_refused(number, tmp_path):
    path = shutil.copytree(FIXTURES / FORMATS[-1] / "gan", tmp_path / "step-00000002")
    note = json.loads((path / "checkpoint.json").read_text())
    note["format"] = number
    (path / "checkpoint.json").write_text(json.dumps(note))
    with pytest.raises(checkpoint.CheckpointError, match="update fastcifar"):
        checkpoint.load(path)
