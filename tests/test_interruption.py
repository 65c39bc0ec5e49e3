"""What a person, a scheduler or the arithmetic throws at a run: signals, losses that are not finite, full memory."""

import contextlib
import json
import os
import pathlib
import signal
from unittest import mock

import pytest
import torch
from distributed_case import run_ranks
from training_case import result_of, status_of, write_tiny

from fastcifar import train
from fastcifar.training import adversarial, checkpoint, classify, distributed, loop, memory, optimisers, recipe

COMMON = ["--amp-dtype", "fp32", "--device", "cpu", "--steps", "12", "--save-every", "4", "--eval-every", "0"]
CLASSIFIER = ["--model-option", "width=0.05", "-b", "16", "--lr", "0.1", "--dataset", "npz:tiny.npz", *COMMON]
GAN = ["--model", "dcgan", "--model-option", "width=1", "--model-option", "latent_dim=4", "-b", "8", *COMMON]
GAN += ["--dataset", "npz:tiny32.npz"]
KINDS = {"classifier": (CLASSIFIER, classify.Classification), "dcgan": (GAN, adversarial.Adversarial)}


@pytest.fixture(params=KINDS)
def run(request, tmp_path, monkeypatch, no_curves, one_thread):
    """The command line of a run, and the class of its task."""
    monkeypatch.chdir(tmp_path)
    write_tiny("tiny.npz")
    write_tiny("tiny32.npz", size=32)
    return KINDS[request.param]


def at_step(monkeypatch, task, number, act):
    """Has `act(task)` happen before a step, each time it is made."""
    original = task.train_step

    def train_step(self, step):
        if step == number:
            act(self)
        original(self, step)

    monkeypatch.setattr(task, "train_step", train_step)


def rows(folder):
    return [json.loads(line) for line in pathlib.Path(folder, "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_saves_and_the_rest_follows_exactly(name, run, monkeypatch, capfd):
    arguments, task = run
    number = getattr(signal, name)
    before = signal.getsignal(number)
    assert status_of([*arguments, "--output", "whole"]) == 0
    whole = result_of(capfd)
    with monkeypatch.context() as patch:
        at_step(patch, task, 5, lambda _: os.kill(os.getpid(), number))
        assert status_of([*arguments, "--output", "parts"]) == 128 + number
    assert signal.getsignal(number) is before
    said = capfd.readouterr()
    assert f"stopped by signal {int(number)} after step 6" in said.out
    assert ("once more to stop at once" in said.err) == (name == "SIGINT")
    assert checkpoint.find("parts", notify=pytest.fail).step == 6
    assert status_of([*arguments, "--output", "parts", "--resume", "auto"]) == 0
    assert result_of(capfd)["state_sha256"] == whole["state_sha256"]
    assert [row["step"] for row in rows("parts")] == list(range(1, 13))


def test_a_second_interrupt_stops_at_once(run, monkeypatch):
    arguments, task = run

    def twice(_):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the step went on")

    at_step(monkeypatch, task, 5, twice)
    assert status_of([*arguments, "--output", "run"]) == 130
    assert checkpoint.find("run", notify=pytest.fail).step == 4


def break_next_step(task):
    """Makes one step's loss infinite."""
    original = task.loader.render

    def render(plan):
        task.loader.render = original
        made = original(plan)
        return made._replace(images=made.images * float("inf"))

    task.loader.render = render


@pytest.mark.parametrize("policy", ["stop", "skip", "rollback"])
def test_a_bad_step_changes_neither_weights_nor_statistics(policy, run, monkeypatch, capsys):
    arguments, task = run
    before, differing = {}, []

    def break_once(self):
        if not before:
            break_next_step(self)
            before.update({name: tensor.clone() for name, tensor in self.network_tensors().items()})

    def compare(self):
        for name, tensor in self.network_tensors().items():
            # A GAN's generator still takes its own step, through the discriminator's statistics.
            own_step = task is adversarial.Adversarial and ("discriminator" not in name or "running_" in name)
            averaged = name.startswith("ema.")
            if tensor.is_floating_point() and not own_step and not averaged and not torch.equal(tensor, before[name]):
                differing.append(name)

    at_step(monkeypatch, task, 6, break_once)
    if policy == "skip":
        at_step(monkeypatch, task, 7, compare)
    status = status_of([*arguments, "--nan", policy, "--output", "run"])
    assert status == (3 if policy == "stop" else 0)
    assert before and not differing
    assert all(tensor.isfinite().all() for tensor in checkpoint.find("run", pytest.fail).tensors.values())
    said = capsys.readouterr()
    if policy == "stop":
        assert "not finite at step 7" in said.err and checkpoint.find("run", pytest.fail).step == 4
    else:
        result = json.loads(said.out.splitlines()[-1])
        assert (result["skipped_steps"], result["rollbacks"]) == ((1, 0) if policy == "skip" else (0, 1))


@pytest.mark.parametrize("fp16", [False, True], ids=["plain", "scaled"])
def test_a_bad_first_step_leaves_no_momentum(fp16):
    """torch's fused SGD takes uninitialised memory for momentum where its first step is skipped."""
    for _ in range(20):
        torch.full((64, 64), 1e30)  # what is freed here may be what momentum gets
        model = torch.nn.Linear(64, 64)
        chosen = recipe.resolve({"opt": "sgd", "momentum": 0.9, "lr": 0.1, "weight_decay": 0.0}, has_gpu=False)
        update = optimisers.GuardedStep(
            optimisers.build_optimiser(chosen, model), model, 0.0, torch.device("cpu"), fp16=fp16
        )
        momenta = [state["momentum_buffer"] for state in update.optimiser.state.values()]
        assert len(momenta) == 2 and not any(buffer.any() for buffer in momenta)
        before = model.weight.detach().clone()
        update(model(torch.full((1, 64), float("inf"))).sum(), 0, 0.1)
        assert torch.equal(model.weight, before)
        update(model(torch.ones(1, 64)).sum(), 1, 0.1)
        torch.testing.assert_close(model.weight, before - 0.19, rtol=0, atol=1e-5)


def test_rollback_goes_back_with_half_the_rate(run, monkeypatch, capsys):
    arguments, task = run
    broken = []

    def break_twice(self):
        if len(broken) < 2:
            broken.append(True)
            break_next_step(self)

    with monkeypatch.context() as patch:
        at_step(patch, task, 6, break_twice)
        assert status_of([*arguments, "--nan", "rollback", "--output", "run"]) == 0
    said = capsys.readouterr().out
    assert "back to step 4, learning rate × 0.5 from here (1 of 5 times)" in said
    assert "back to step 4, learning rate × 0.25 from here (2 of 5 times)" in said
    assert [row["step"] for row in rows("run")] == list(range(1, 13))
    rates = [row["learning_rate"] for row in rows("run")]
    assert status_of([*arguments, "--output", "usual"]) == 0
    fresh = [row["learning_rate"] for row in rows("usual")]
    assert rates[:4] == fresh[:4] and rates[4:] == [rate / 4 for rate in fresh[4:]]


def test_rollback_gives_up(run, monkeypatch, capsys):
    arguments, task = run
    at_step(monkeypatch, task, 6, break_next_step)
    assert status_of([*arguments, "--nan", "rollback", "--output", "run"]) == 3
    error = capsys.readouterr().err
    assert f"after {loop.ROLLBACKS} returns to earlier steps" in error and len(error.splitlines()) == 1
    assert checkpoint.find("run", pytest.fail).step == 4


def test_a_resumed_run_remembers_its_rollbacks(run, monkeypatch, capsys):
    arguments, task = run
    arguments = [*arguments, "--nan", "rollback"]
    broken = []
    at_step(monkeypatch, task, 6, lambda self: broken or (broken.append(1), break_next_step(self)))
    assert status_of([*arguments, "--output", "whole"]) == 0
    whole = result_of(capsys)
    broken.clear()
    with monkeypatch.context() as patch:
        at_step(patch, task, 9, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        assert status_of([*arguments, "--output", "parts"]) == 128 + signal.SIGTERM
    assert status_of(["--resume", "parts"]) == 0
    result = result_of(capsys)
    assert (result["state_sha256"], result["rollbacks"]) == (whole["state_sha256"], 1)


def _roll_back(rank, world_size, source, folder):
    broken, original = [], classify.Classification.train_step

    def train_step(self, step):
        if step == 6 and rank == 1 and not broken:
            broken.append(True)
            break_next_step(self)
        original(self, step)

    names = {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    patches = [mock.patch.dict(os.environ, names), mock.patch.object(distributed, "leave", lambda: None)]
    patches.append(mock.patch.object(classify.Classification, "train_step", train_step))
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        return status_of([*CLASSIFIER, "--dataset", source, "--nan", "rollback", "--output", folder])


def test_all_processes_go_back_together(tmp_path):
    source = write_tiny(tmp_path / "tiny.npz")
    assert run_ranks(_roll_back, 2, source, tmp_path / "run") == [0, 0]
    assert json.loads((tmp_path / "run/result.json").read_text())["rollbacks"] == 1
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, 13))


CPU_REFUSES = "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to allocate"
REFUSALS = {
    "processor": RuntimeError(CPU_REFUSES),
    "GPU": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "Python": MemoryError(),
}


@pytest.mark.parametrize("error", REFUSALS.values(), ids=REFUSALS.keys())
def test_out_of_memory_names_the_peak_and_a_batch_size_that_was_tried(error, run, monkeypatch, capsys):
    arguments, task = run
    original, sizes = task.train_step, []

    def train_step(self, step):
        sizes.append(self.recipe.batch_size)
        if step >= 1 and self.recipe.batch_size > 3:
            raise error
        original(self, step)

    monkeypatch.setattr(task, "train_step", train_step)
    assert status_of([*arguments, "--output", "run"]) == 5
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1 and "Traceback" not in message
    assert f"out of memory in step 2 with --batch-size {sizes[0]}" in message
    assert "the process held at most" in message and " MiB" in message
    assert "--batch-size 2 was tried and fits" in message
    assert sizes[:2] == [sizes[0]] * 2 and sizes[-2:] == [2, 2]
    assert not checkpoint.list_checkpoints(pathlib.Path("run/checkpoints"))


def test_nothing_fits(run, monkeypatch, capsys):
    arguments, task = run

    def refuse(self, step):
        raise MemoryError

    monkeypatch.setattr(task, "train_step", refuse)
    assert status_of([*arguments, "--output", "run"]) == 5
    assert "no half, quarter, … of it fits" in capsys.readouterr().err


def test_other_errors_are_not_taken_for_a_lack_of_memory(run, monkeypatch):
    arguments, task = run

    def fail(self, step):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(task, "train_step", fail)
    with pytest.raises(RuntimeError, match="mat1"):
        train.main([*arguments, "--output", "run"])
    assert not memory.is_out_of_memory(ValueError("out of memory"))


def test_memory_that_ends_outside_a_step_is_one_line_too(run, monkeypatch, capsys):
    arguments, task = run

    def refuse(self):
        raise RuntimeError(CPU_REFUSES)

    monkeypatch.setattr(task, "summary", refuse)
    assert status_of([*arguments, "--output", "run"]) == 5
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "out of memory" in error
    assert checkpoint.find("run", pytest.fail).step == 12
