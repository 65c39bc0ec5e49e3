"""The tools that measure: turns, agreement, stored results, pictures, comparison, the GPU script."""

import argparse
import json
import pathlib
import runpy
import shutil
import subprocess
import sys

import pytest
import torch

from benchmarks import agreement, compare, device_tables, model, operators, report, reporting, timing
from fastcifar import train

ROOT = pathlib.Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu_check.sh"
EXACT = [torch.tensor([1.0, -2.0], dtype=torch.float64)]


def test_calls_take_turns_and_phases_are_told_apart():
    order = []

    def phases():
        order.append("prepare")
        yield
        order.append("a1")
        yield "forward"
        order.append("a2")
        yield "backward"

    found = timing.in_turns({"a": phases, "b": lambda: order.append("b")}, rounds=2, warmup=1)
    assert order == ["prepare", "a1", "a2", "b"] * 3
    assert {name: {phase: len(laps) for phase, laps in p.items()} for name, p in found.items()} == {
        "a": {"forward": 2, "backward": 2},
        "b": {"whole": 2},
    }


def test_a_spent_budget_still_leaves_three_rounds():
    found = timing.in_turns({"a": lambda: None}, rounds=50, budget=0.0)
    assert len(found["a"]["whole"]) == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts the allocations of the CPU")
def test_peak_memory_counts_tensors_that_live_together():
    kept = [torch.ones(2**20)]

    def call():
        # What was there before and goes does not make room.
        kept.clear()
        first = torch.ones(2**18)
        del first
        second = torch.ones(2**18)
        kept.append(second + 1)

    assert timing.peak_mib(call) == pytest.approx(2.0, abs=0.01)
    assert timing.peak_mib(call) == pytest.approx(2.0, abs=0.01)


def test_what_is_wrong_is_not_timed():
    calls = {
        "eager": lambda: [torch.tensor([1.001, -2.0])],
        "near": lambda: [torch.tensor([1.002, -2.0])],
        "far": lambda: [torch.tensor([1.2, -2.0])],
        "nan": lambda: [torch.tensor([float("nan"), -2.0])],
        "broken": lambda: 1 / 0,
    }
    reasons = agreement.refused(calls, EXACT, eager="eager", ours="near", eps=2**-23)
    assert set(reasons) == {"far", "nan", "broken"} and reasons["broken"].startswith("ZeroDivisionError")
    with pytest.raises(ArithmeticError, match="far does not agree with float64; nothing is timed"):
        agreement.refused(calls, EXACT, eager="eager", ours="far", eps=2**-23)


def test_an_operator_that_is_wrong_is_refused(monkeypatch):
    subject = operators.tiny(operators.makers(torch.bfloat16)[0])
    name = operators.ours(subject)
    if name is None:
        pytest.skip("no implementation beside the reference runs here")
    right = subject.variant(name)
    monkeypatch.setattr(
        operators, "variants", lambda subject, compiled: {name: right, "eager": subject.variant("reference")}
    )
    operators.measure(subject, compiled=False, rounds=1, warmup=0)
    function = right.function
    right.function = lambda **arguments: 1.5 * function(**arguments)
    with pytest.raises(ArithmeticError, match="does not agree"):
        operators.measure(subject, compiled=False, rounds=1, warmup=0)


def test_stored_tables_are_added_to_the_file_of_the_device(tmp_path):
    path = reporting.store({"a": [{"ms": 1.0}], "b": [{"ms": 2.0}]}, tmp_path)
    assert path == reporting.store({"b": [{"ms": 3.0}]}, tmp_path)
    assert path.name == f"{reporting.device_name()}-torch{torch.__version__.split('+')[0]}.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    assert {name: part["rows"][0]["ms"] for name, part in found.items()} == {"a": 1.0, "b": 3.0}
    assert found["a"]["circumstances"]["torch"] == torch.__version__


def test_the_newest_file_of_each_kind_of_device_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(reporting, "RESULTS", tmp_path)
    for name, facts in {
        "a-torch2.9.0": {"date": "2026-01-01", "torch": "2.9.0+cpu"},
        "a-torch2.11.0": {"date": "2026-01-01", "torch": "2.11.0"},
        "h-torch2.11.0": {"date": "2025-01-01", "torch": "2.11.0", "gpu": "H"},
    }.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"machine": {"circumstances": facts, "rows": []}}))
    assert {kind: name for kind, (name, _) in device_tables.files().items()} == {
        "cpu": "a-torch2.11.0",
        "gpu": "h-torch2.11.0",
    }


def test_pictures_and_tables_are_made_of_stored_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(reporting, "RESULTS", tmp_path)
    assert report.TABLES["operators"]() == "Not measured yet.\n" and report.draw(tmp_path) == []
    rows = [{"operator": "batch_norm_act", "input": "x", "what": "torch.compile", "refused": "broken"}]
    for what, ms in (("native", 2.0), ("eager", 3.0), ("copy", 1.0)):
        for phase in ("forward", "backward", "both"):
            row = {"operator": "batch_norm_act", "input": "x", "what": what, "phase": phase, "ms": ms, "floor, ms": 1.0}
            rows.append(row | {"bytes": 4, "operations": 8, "% of copy rate": 50.0, "peak, MiB": 1.0})
    machine = {"copy, GB/s": 40.0, "float32 matrix product, GFLOP/s": 100.0, "bfloat16 matrix product, GFLOP/s": 400.0}
    name = reporting.store({"operators": rows, "machine": [machine]}, tmp_path).name
    kind = timing.DEVICE.type.replace("cuda", "gpu")
    assert {path.name for path in report.draw(tmp_path)} == {f"roofline-{kind}.png", f"bars-{kind}.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.glob("*.png"))
    table = report.TABLES["operators"]()
    assert "| batch_norm_act | x | 2 | 3 | 1 | 1.5 | 2 |" in table and name in table
    assert "Not timed: torch.compile (broken)." in table
    assert "| 2 ms, 50 % | 3 ms |" in report.TABLES["phases"]()


def test_the_model_counts_the_networks_layers():
    layers = {layer.name: layer for layer in model.layers(batch=2, on_gpu=True)}
    assert len(layers) == 36 and len(model.layers(batch=2, on_gpu=False)) == 36
    x = 2 * 2 * 32 * 32 * 32  # bytes of two images of 32 channels in bfloat16
    assert layers["stages.0.first.depthwise"].bytes == 8 * x
    assert layers["stem.norm"].bytes == 8 * x and layers["stages.0.second.norm"].bytes == 11 * x
    assert layers["stages.0.first.pointwise"].forward_operations == 2 * 2 * 32 * 32 * 32 * 32
    stored = {layer.name: layer for layer in model.layers(batch=2, on_gpu=False)}
    assert stored["stages.0.first.depthwise"].bytes == 10 * x
    # Twice the memory rate halves the floor of what is bound by memory.
    slow, fast = model.H200, {**model.H200, "memory, GB/s": 9600.0}
    assert layers["stem.norm"].seconds(slow) == pytest.approx(2 * layers["stem.norm"].seconds(fast))


def test_operators_and_model_count_the_same():
    subject = operators.depthwise_subject((2, 32, 32, 3, 1), torch.bfloat16, timing.DEVICE)
    on_gpu = timing.DEVICE.type == "cuda"
    layer = {layer.name: layer for layer in model.layers(batch=2, on_gpu=on_gpu)}["stages.0.first.depthwise"]
    assert subject.bytes_moved()["both"] == layer.bytes and subject.operations()["both"] == layer.operations


def test_the_benchmarks_run_at_tiny_sizes():
    files = [f"benchmarks/test_bench_{name}.py" for name in ("operators", "spectral")]
    chosen = "512-32-32-3-1 or 512-64-16-3-2 or 512-64-16-True or spectral"
    command = [sys.executable, "-m", "pytest", "-q", "--benchmark-disable", *files, "-k", chosen]
    end = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert end.returncode == 0, end.stdout
    assert end.stdout.splitlines()[-1].startswith("5 passed")


def test_compare_names_what_git_does_not_know(capsys):
    if not (ROOT / ".git").exists():
        pytest.skip("needs the repository")
    assert compare.main(["no-such-revision"]) == 2
    assert capsys.readouterr().err.startswith("python -m benchmarks.compare: error: git rev-parse: ")


def test_compare_builds_again_when_native_code_differs(tmp_path):
    for name in compare.NATIVE:
        source, target = ROOT / name, tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    assert compare.native_hash(tmp_path) == compare.native_hash(ROOT)
    (tmp_path / "kernels" / "native" / "new.h").write_text("\n")
    assert compare.native_hash(tmp_path) != compare.native_hash(ROOT)


def gpu_stages(*arguments):
    end = subprocess.run(["bash", str(SCRIPT), "--list", *arguments], capture_output=True, text=True)
    assert end.returncode == 0, end.stderr
    return dict(line.split("\t") for line in end.stdout.splitlines())


def test_gpu_stages_can_be_chosen(tmp_path):
    assert list(gpu_stages()) == [
        "install", "doctor", "tests", "train", "bench_steps", "bench_operators", "tune", "aw_sngan", "static", "dcgan",
        "memcheck",
    ]  # fmt: skip
    chosen = gpu_stages(str(tmp_path), "dcgan", "train")
    assert list(chosen) == ["install", "train", "dcgan"] and f"--data-dir {tmp_path} " in chosen["train"]


class _Parsed(Exception):
    pass


@pytest.mark.parametrize("stage", ["tune", "static"])
def test_the_measuring_commands_of_the_gpu_script_parse(stage, monkeypatch):
    python, option, module, *arguments = gpu_stages()[stage].split()
    assert (python, option) == ("python3", "-m")
    parse = argparse.ArgumentParser.parse_args

    def stop_after(parser, given=None, namespace=None):
        parse(parser, given, namespace)
        raise _Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop_after)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(_Parsed):
        runpy.run_module(module, run_name="__main__")


@pytest.mark.parametrize("stage", ["train", "aw_sngan", "dcgan"])
def test_the_training_commands_of_the_gpu_script_are_valid(stage, monkeypatch):
    *command, folder = gpu_stages()[stage].split()
    assert command[:3] == ["python3", "-m", "fastcifar.train"]
    if "--classifier" in command:
        at = command.index("--classifier")
        assert command[at + 1] == f"{folder.rpartition('/')[0]}/train"
        del command[at : at + 2]

    def stop_here(*arguments, **options):
        raise _Parsed

    # All options are checked before the images are read.
    monkeypatch.setattr(train.data, "load_dataset", stop_here)
    with pytest.raises(_Parsed):
        train.main([*command[3:], folder])


def test_the_files_and_tests_that_the_gpu_script_names_exist():
    stages = gpu_stages()
    words = f"{stages['bench_steps']} {stages['bench_operators']}".split()
    files = sorted(f"benchmarks/{path.name}" for path in (ROOT / "benchmarks").glob("test_bench_*.py"))
    assert sorted(word for word in words if word.endswith(".py")) == files
    assert all(" -m gpu " in stages[name] for name in ("tests", "memcheck")) and " -k memcheck " in stages["memcheck"]
    assert any("memcheck(" in path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*_gpu.py"))
