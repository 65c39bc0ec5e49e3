"""`--profile`: what it counts, and that profiled steps are steps like all others."""

import json

import pytest
import torch
from capture_case import make, values_after
from training_case import TINY, status_of, write_tiny

from fastcifar import data, profiling
from fastcifar.training.profile import StepProfile, _Counting, copy_rate

CPU = torch.device("cpu")


def test_bytes_are_those_of_tensors_in_and_out():
    a, b = torch.zeros(10, 10), torch.zeros(10, dtype=torch.float64)
    counting = _Counting()
    with counting:
        a.t()
        a + b
        a.add_(1.0)
        torch.cat([a, a])
    assert counting.calls["aten::t"] == 1 and counting.bytes["aten::t"] == 0  # a view
    assert counting.bytes["aten::add"] == 400 + 80 + 800
    assert counting.bytes["aten::add_"] == 400  # written where it was read
    assert counting.bytes["aten::cat"] == 400 + 800


@pytest.mark.parametrize("model", ["ds_resnet", "aw_sngan"])
def test_profiled_steps_are_steps(model, tmp_path):
    dataset = data.load_dataset(write_tiny(tmp_path / "tiny.npz", size=32))
    options = {"model": model, "model_options": {"width": 0.25} if model == "ds_resnet" else {"width": 4}}
    task = make(dataset, CPU, **options)
    profile = StepProfile(task, tmp_path / "profile")
    for step in range(10):
        profile.train_step(step)
        assert (profile.report is not None) == (step >= 8)
    assert not profiling.enabled()
    expected = values_after(make(dataset, CPU, **options), 10)
    assert all(torch.equal(value, expected[name]) for name, value in task.network_tensors().items())
    rows = [line.split() for line in profile.report.splitlines()]
    wanted = "fastcifar::native_depthwise_statistics" if model == "ds_resnet" else "aten::convolution"
    (row,) = [row for row in rows if row[0] == wanted]
    assert int(row[1]) > 0 and float(row[2]) > 0 and 0 < float(row[3]) < 100 and float(row[4]) > 0
    operators = [row for row in rows[1:] if "::" in row[0] or row[0] in profiling.OPERATORS]
    assert len(operators) > 5 and sum(float(row[3]) for row in operators) <= 100.5
    events = json.loads((tmp_path / "profile" / "trace.json").read_text())["traceEvents"]
    names = {event.get("name") for event in events}
    assert {"place", "step", wanted} <= names
    if model == "aw_sngan":
        assert {"discriminator", "generator", "spectral_normalize", "aw_hinge_combine"} <= names


def test_the_command_writes_a_profile(tmp_path, capsys):
    source = write_tiny(tmp_path / "tiny.npz")
    output = tmp_path / "run"
    assert status_of([*TINY, "--dataset", source, "--steps", "10", "--output", output, "--profile", "--nvtx"]) == 0
    assert profiling.enabled()
    profiling.disable()
    assert "% of copy rate" in capsys.readouterr().out
    assert (output / "profile" / "operators.txt").read_text().startswith("operator")


def test_a_copy_has_a_rate():
    assert 1e8 < copy_rate(CPU) < 1e13
