"""The life of a run: steps, rows of metrics, evaluations, checkpoints, and stopping at any moment without loss."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch

from fastcifar.training import checkpoint
from fastcifar.training.adversarial import Adversarial
from fastcifar.training.classify import Classification
from fastcifar.training.distributed import Processes
from fastcifar.training.profile import StepProfile
from fastcifar.training.progress import Lines
from fastcifar.training.run_folder import RunFolder
from fastcifar.training.signals import StopRequest


class Stopped(Exception):
    """A signal ended the run early; `signal` is its number and the state is saved."""

    def __init__(self, signal: int, step: int):
        super().__init__(f"stopped by signal {signal} after step {step}; --resume auto goes on from there")
        self.signal = signal


class NotFinite(Exception):
    """A loss or gradient was not finite and the recipe says to stop; the weights are those before it."""


class SaveFailed(Exception):
    """The last checkpoint could not be written."""


class Loop:
    """Runs a task's steps.

    Args:
        task: what is trained.
        folder: of the run; used by the first process only.
        progress: told what happens.
        processes: all processes of the run.
        step, seconds: what an earlier part of the run has done, and the time that its steps took.
    """

    def __init__(
        self,
        task: Classification | Adversarial,
        folder: RunFolder | None,
        progress: Lines,
        processes: Processes,
        *,
        step: int = 0,
        seconds: float = 0.0,
    ):
        self.task, self.folder, self.progress, self.processes = task, folder, progress, processes
        self.recipe = task.recipe
        self.step, self.seconds = step, seconds
        self._log_every = max(1, min(50, self.recipe.steps // 40))
        # With NCCL the question to the other processes waits for the GPU.
        self._ask_every = 10 if processes.world_size > 1 and task.device.type == "cuda" else 1
        self._since = (step, seconds)
        self._saved = step if step else -1
        self._warned = self._told = False
        self._profile: StepProfile | None = None
        if self.recipe.profile and folder is not None:
            self._profile = StepProfile(task, folder.path / "profile")

    def run(self) -> None:
        """All steps that are left.

        Raises:
            Stopped, NotFinite, SaveFailed.
        """
        steps = self.recipe.steps
        with StopRequest() as stop:
            while self.step < steps:
                started = time.perf_counter()
                self._train_step(self.step)
                self.step += 1
                due = self._due(self._log_every) or self._due(self.recipe.eval_every) or self.step == steps
                if due:
                    self._wait()
                self.seconds += time.perf_counter() - started
                if due:
                    self._row()
                # The same answer everywhere, whichever process the signal went to.
                signal = self.processes.largest(stop.signal or 0) if self.step % self._ask_every == 0 else 0
                if self._due(self.recipe.save_every) or self.step == steps or signal:
                    self._save(last=self.step == steps or signal > 0)
                if signal and self.step < steps:
                    raise Stopped(signal, self.step)

    def _train_step(self, step: int) -> None:
        if self._profile is None:
            self.task.train_step(step)
            return
        self._profile.train_step(step)
        if self._profile.report is not None:
            self.progress.message(self._profile.report)
            self._profile = None

    def _due(self, every: int) -> bool:
        return bool(every) and self.step % every == 0

    def _wait(self) -> None:
        if self.task.device.type == "cuda":
            torch.cuda.synchronize(self.task.device)

    def _row(self) -> None:
        self._check_finite()
        recipe = self.recipe
        steps, seconds = self.step - self._since[0], self.seconds - self._since[1]
        self._since = (self.step, self.seconds)
        row: dict[str, Any] = {
            "step": self.step,
            "epoch": round(self.task.epoch(self.step), 4),
            "learning_rate": self.task.learning_rate(self.step - 1),
            **self.task.take_averages(),
            "images_per_second": round(steps * recipe.batch_size / seconds, 1) if seconds > 0 else None,
            "seconds": round(self.seconds, 3),
            **self.task.tick(self.step, steps, seconds),
        }
        if self._due(recipe.eval_every) or self.step == recipe.steps:
            row |= self.task.evaluation_row()
            if self.folder is not None:
                self.task.write_samples(self.folder.path / "samples", self.step)
        if self.folder is not None:
            self.folder.add(row)
        self.progress.show(row)
        graph = self.task.graph
        if graph is not None and graph.failure is not None and not self._told:
            self.progress.message(f"WARNING: steps are not captured in a CUDA graph: {graph.failure}")
            self._told = True
        warning = self.task.watch(row)
        if warning is not None and not self._warned:
            self.progress.message(warning)
        self._warned = warning is not None

    def _check_finite(self) -> None:
        bad = int(self.task.bad_steps)
        # In float16 each process looks at its own loss.
        if not self.processes.any(bad > 0):
            return
        first = self.processes.largest(int(self.task.first_bad)) + 1
        if self.recipe.nan == "stop":
            raise NotFinite(
                f"loss or gradients were not finite at step {first} ({bad} such steps, none of which changed the "
                f"weights); lower --lr {self.recipe.lr:g}, set --clip-grad 1, or pass --nan skip"
            )
        self.progress.message(f"skipped {bad} steps so far whose loss or gradients were not finite (first: {first})")

    def _save(self, *, last: bool) -> None:
        if self._saved == self.step:
            return
        tensors, state = self.task.state()
        failure = self._write(tensors, state)
        # Nobody leaves before the last checkpoint is there: a process that ends has torchrun end the others.
        if last and self.processes.any(failure is not None):
            place = "the run folder" if self.folder is None else self.folder.path / "checkpoints"
            reason = "the first process says why" if failure is None else failure
            raise SaveFailed(f"the last checkpoint could not be written to {place} ({reason})") from failure
        if failure is not None:
            self.progress.message(f"WARNING: no checkpoint at step {self.step} ({failure}); the older ones are intact")

    def _write(self, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> OSError | None:
        """Writes the checkpoint, in the first process only; what went wrong."""
        if self.folder is None:
            return None
        state |= {"config": dataclasses.asdict(self.recipe), "seconds": self.seconds, "since": list(self._since)}
        place = self.folder.path / "checkpoints"
        try:
            checkpoint.save(place, self.step, tensors, state)
            checkpoint.prune(place, self.recipe.keep_last)
            self._saved = self.step
        except OSError as error:
            return error
        return None

    def resume(self, saved: checkpoint.Checkpoint) -> None:
        """Goes on from a checkpoint."""
        self.task.load_state(saved)
        self.step = self._saved = saved.step
        self.seconds = saved.state["seconds"]
        self._since = tuple(saved.state["since"])


def read_config(saved: checkpoint.Checkpoint) -> dict[str, Any]:
    """The options of the run that a checkpoint belongs to.

    Raises:
        CheckpointError: it holds none.
    """
    config = saved.state.get("config") if isinstance(saved.state, dict) else None
    if not isinstance(config, dict):
        raise checkpoint.CheckpointError(f"{saved.path}/checkpoint.json holds no configuration; the file is damaged")
    return config
