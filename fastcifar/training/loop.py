"""The life of a run: steps, rows of metrics, evaluations, checkpoints, and stopping at any moment without loss."""

from __future__ import annotations

import collections
import dataclasses
import pathlib
import statistics
import time
from typing import Any

import torch

from fastcifar.training import checkpoint, memory
from fastcifar.training.adversarial import Adversarial
from fastcifar.training.classify import Classification
from fastcifar.training.distributed import Processes
from fastcifar.training.profile import StepProfile
from fastcifar.training.progress import Lines
from fastcifar.training.run_folder import RunFolder
from fastcifar.training.signals import StopRequest

# With --nan rollback: how often a run may go back before it stops.
ROLLBACKS = 5
# How many times slower than usual, and by how many seconds at least, the steps of a row must be for a warning.
STALL_FACTOR, STALL_SECONDS = 5.0, 10.0


class Stopped(Exception):
    """A signal ended the run early; `signal` is its number and the state is saved."""

    def __init__(self, signal: int, step: int):
        super().__init__(f"stopped by signal {signal} after step {step}; --resume auto goes on from there")
        self.signal = signal


class NotFinite(Exception):
    """A loss or gradient was not finite and the recipe says to stop; the weights are those before it."""


class OutOfMemory(Exception):
    """A step did not fit into the memory."""

    def __init__(self, step: int, reason: str):
        super().__init__(reason)
        self.step = step


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

    `rollbacks` counts how often --nan rollback went back; `signal` is one that came in the last step or after it, or 0.
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
        self._warned = self._told = self._refused = False
        self._bad = 0
        self.rollbacks = 0
        self.signal = 0
        self._good: checkpoint.Checkpoint | None = None
        self._paces: collections.deque[float] = collections.deque(maxlen=50)
        self._profile: StepProfile | None = None
        if self.recipe.profile and folder is not None:
            self._profile = StepProfile(task, folder.path / "profile")

    def run(self) -> None:
        """All steps that are left.

        Raises:
            Stopped, NotFinite, OutOfMemory, SaveFailed.
        """
        steps = self.recipe.steps
        self._remember()
        with StopRequest() as stop:
            while self.step < steps:
                started = time.perf_counter()
                self._train_step()
                self.step += 1
                due = self._due(self._log_every) or self._due(self.recipe.eval_every) or self.step == steps
                if due:
                    self._wait()
                self.seconds += time.perf_counter() - started
                # The same answer everywhere, whichever process the signal went to.
                signal = self.processes.largest(stop.signal or 0) if self.step % self._ask_every == 0 else 0
                save = self._due(self.recipe.save_every) or self.step == steps or signal > 0
                if (due or save) and self._settle_bad_steps():
                    continue
                if due:
                    self._row()
                if save:
                    self._remember()
                    self._save(last=self.step == steps or signal > 0)
                if signal and self.step < steps:
                    raise Stopped(signal, self.step)
            self.signal = stop.signal or 0

    def _train_step(self) -> None:
        try:
            if self._profile is None:
                self.task.train_step(self.step)
            else:
                self._train_profiled()
            return
        except (MemoryError, RuntimeError) as error:
            if not memory.is_out_of_memory(error):
                raise
            reason = " ".join(str(error).split())[:200]
        # Out of reach of the error, whose frames hold the tensors of the failed step.
        raise OutOfMemory(self.step, reason)

    def _train_profiled(self) -> None:
        self._profile.train_step(self.step)
        if self._profile.report is not None:
            self.progress.message(self._profile.report)
            self._profile = None

    def _due(self, every: int) -> bool:
        return bool(every) and self.step % every == 0

    def _wait(self) -> None:
        if self.task.device.type == "cuda":
            torch.cuda.synchronize(self.task.device)

    def _row(self) -> None:
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
            self._write_samples()
        if self.folder is not None:
            self.folder.add(row)
            if self.folder.problem and not self._refused:
                self.progress.message(f"WARNING: metrics cannot be written ({self.folder.problem}); tried again later")
            self._refused = self.folder.problem is not None
            if self.folder.lost_tracker:
                self.progress.message(
                    f"WARNING: a tracker failed and gets no more metrics ({self.folder.lost_tracker})"
                )
                self.folder.lost_tracker = None
        self.progress.show(row)
        self._watch_pace(steps, seconds)
        graph = self.task.graph
        if graph is not None and graph.failure is not None and not self._told:
            self.progress.message(f"WARNING: steps are not captured in a CUDA graph: {graph.failure}")
            self._told = True
        warning = self.task.watch(row)
        if warning is not None and not self._warned:
            self.progress.message(warning)
        self._warned = warning is not None

    def _write_samples(self) -> None:
        if self.folder is None:
            return
        try:
            self.task.write_samples(self.folder.path / "samples", self.step)
        except OSError as error:
            self.progress.message(f"WARNING: no samples at step {self.step} ({error})")

    def _watch_pace(self, steps: int, seconds: float) -> None:
        pace = seconds / max(steps, 1)
        usual = statistics.median(self._paces) if len(self._paces) >= 5 else pace
        self._paces.append(pace)
        if pace > STALL_FACTOR * usual and seconds - steps * usual > STALL_SECONDS:
            self.progress.message(
                f"WARNING: the last {steps} steps took {seconds:.0f} s, usual are {steps * usual:.1f} s; is something "
                "else using this machine?"
            )

    def _settle_bad_steps(self) -> bool:
        """Obeys --nan where steps since the last look were not finite; whether the run went back."""
        bad = int(self.task.bad_steps)
        # In float16 each process looks at its own loss.
        if not self.processes.any(bad > self._bad):
            return False
        self._bad = bad
        first = self.processes.largest(int(self.task.first_bad)) + 1
        what = "loss or gradients were not finite"
        if self.recipe.nan == "skip":
            self.progress.message(f"skipped {bad} steps so far whose {what} (first: {first})")
            return False
        if self.recipe.nan == "rollback" and self.rollbacks < ROLLBACKS:
            self._go_back(f"{what} at step {first}")
            return True
        tried = f" after {self.rollbacks} returns to earlier steps" if self.rollbacks else ""
        raise NotFinite(
            f"{what} at step {first}{tried} ({bad} such steps, none of which changed the weights); lower --lr "
            f"{self.recipe.lr:g}, set --clip-grad 1, or pass --nan skip"
        )

    def _remember(self) -> None:
        """Keeps the state to go back to; in memory, as every process needs its own and a disk may fail."""
        if self.recipe.nan == "rollback":
            tensors, state = self.task.state()
            copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
            self._good = checkpoint.Checkpoint(self.step, copies, state, pathlib.Path("memory"))

    def _go_back(self, found: str) -> None:
        """To the last state that was kept, with half the learning rate from there on.

        Source: Zhang et al., OPT, 2022, where people did so by hand.
        """
        good = self._good
        copies = {name: tensor.clone() for name, tensor in good.tensors.items()}
        self.task.load_state(dataclasses.replace(good, tensors=copies))
        self.step, self._since, self._bad = good.step, (good.step, self.seconds), int(self.task.bad_steps)
        self._set_rollbacks(self.rollbacks + 1)
        if self.folder is not None:
            self._rewind(self.folder)
        self.progress.message(
            f"WARNING: {found}: back to step {self.step}, learning rate × {self.task.rate_factor:g} from here "
            f"({self.rollbacks} of {ROLLBACKS} times)"
        )

    def _rewind(self, folder: RunFolder) -> None:
        try:
            folder.rewind(self.step)
        except OSError as error:
            folder.problem = str(error)

    def _set_rollbacks(self, count: int) -> None:
        self.rollbacks, self.task.rate_factor = count, 0.5**count

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
        state["rollbacks"] = self.rollbacks
        self.folder.flush()
        place = self.folder.path / "checkpoints"
        try:
            checkpoint.save(place, self.step, tensors, state)
            checkpoint.prune(place, self.step, self.recipe.keep_last)
            self._saved = self.step
        except OSError as error:
            return error
        return None

    def resume(self, saved: checkpoint.Checkpoint) -> None:
        """Goes on from a checkpoint.

        Raises:
            CheckpointError: it is of another recipe, or its JSON is not what a run writes.
        """
        try:
            self.task.load_state(saved)
            self.seconds = float(saved.state["seconds"])
            step, seconds = saved.state["since"]
            self._since = (int(step), float(seconds))
            self._set_rollbacks(int(saved.state.get("rollbacks", 0)))
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise checkpoint.CheckpointError(f"{saved.path} is not a checkpoint of this recipe ({reason})") from error
        self.step = self._saved = saved.step
        self._bad = int(self.task.bad_steps)
