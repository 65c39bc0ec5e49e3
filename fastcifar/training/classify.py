"""Classification: the network, one training step, and the state that a checkpoint holds."""

from __future__ import annotations

import pathlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastcifar import data
from fastcifar.profiling import annotate
from fastcifar.training import distributed, environment, evaluation, schedule, transfer
from fastcifar.training.answers import Answers
from fastcifar.training.capture import Feed, build_graph
from fastcifar.training.checkpoint import Checkpoint, CheckpointError
from fastcifar.training.distil import Teacher, distillation_loss
from fastcifar.training.ema import WeightAverage
from fastcifar.training.networks import build_model, check_same_images, moments
from fastcifar.training.optimisers import GuardedStep, begin_momentum, build_optimiser
from fastcifar.training.options import Recipe
from fastcifar.training.robustness import AdversarialTraining
from fastcifar.training.state import by_part, load_optimiser, optimiser_tensors


class Classification:
    """A network in training; every step is a pure function of the state and the step's number.

    Args:
        recipe: with its budget resolved.
        dataset: images and labels.
        device: of the network and the resident images.
        processes: those that share each global batch.

    Raises:
        ValueError: options that do not fit together, the data set or the number of processes.
    """

    def __init__(
        self, recipe: Recipe, dataset: data.ImageDataset, device: torch.device, processes: distributed.Processes
    ):
        if recipe.batch_size % processes.world_size:
            raise ValueError(
                f"--batch-size {recipe.batch_size} is not a multiple of the {processes.world_size} processes"
            )
        self.recipe, self.dataset, self.device, self.processes = recipe, dataset, device, processes
        self.amp_dtype = environment.DTYPES[environment.choose_amp_dtype(recipe.amp_dtype, device)]
        self.model = build_model(recipe, dataset).to(device=device, memory_format=torch.channels_last)
        self.ema = WeightAverage(self.model, recipe.model_ema_decay) if recipe.model_ema_decay else None
        self.optimiser = build_optimiser(recipe, self.model)
        fp16 = self.amp_dtype == torch.float16
        self.update = GuardedStep(self.optimiser, self.model, recipe.clip_grad, device, fp16)
        self.rate_factor = 1.0
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.correct = torch.zeros((), dtype=torch.int64, device=device)
        self.seen = 0
        self._has_dropout = any(isinstance(m, nn.modules.dropout._DropoutNd) for m in self.model.modules())
        self.phases, self._frozen = transfer.phases(recipe.phases, recipe.steps), False
        self._unshared: list[torch.Tensor] = []
        if processes.world_size > 1:
            self._unshared = distributed.share_statistics(self.model, synchronise=recipe.sync_bn)
        self._forward = self._wrapped()
        self.loader = self._build_loader()
        self.teacher, self.answers = self._build_teacher()
        self.attack = None
        if recipe.adversarial != "off":
            self.attack = AdversarialTraining(recipe, dataset, device, self.amp_dtype)
        # On a GPU always static: a captured step then equals the same step as it is.
        self.feed = Feed(device, static=device.type == "cuda")
        self.graph, self.graph_notice = build_graph(self.compute, device, recipe, self.amp_dtype, processes.world_size)

    def _build_teacher(self) -> tuple[Teacher | None, Answers | None]:
        recipe = self.recipe
        if not recipe.teacher or recipe.eval_only:
            return None, None
        teacher = Teacher(
            recipe.teacher, self.dataset, self.device, self.amp_dtype, recipe.impl, holdout=recipe.holdout
        )
        if not recipe.kd_cache:
            return teacher, None
        if self.processes.world_size > 1:
            raise ValueError(f"--kd-cache is for one process, there are {self.processes.world_size}; drop it")
        return teacher, Answers(teacher, self.loader, self.dataset, self.device)

    def _wrapped(self) -> Any:
        """The network as a step calls it; anew when what is trained changes, as both wrappers rest on that."""
        forward: Any = self.model
        if self.processes.world_size > 1:
            forward = distributed.data_parallel(self.model)
        return torch.compile(forward) if self.recipe.compile else forward

    def _enter_phase(self, step: int) -> None:
        frozen = transfer.phase_at(self.phases, step).frozen
        if frozen == self._frozen:
            return
        transfer.freeze(self.model, frozen)
        begin_momentum(self.optimiser)
        self._frozen, self._forward = frozen, self._wrapped()
        if self.graph is not None:
            self.graph.reset()

    def _build_loader(self) -> data.ResidentLoader:
        recipe, dataset = self.recipe, self.dataset
        augmentation = data.Augmentation(
            crop_pad=recipe.crop_pad,
            crop_mode=recipe.crop_mode,
            hflip=recipe.hflip,
            color_jitter=recipe.color_jitter,
            cutout=recipe.cutout,
            mixup=recipe.mixup,
            cutmix=recipe.cutmix,
        )
        return data.ResidentLoader(
            dataset.train_images,
            dataset.train_labels,
            batch_size=recipe.batch_size,
            num_classes=dataset.num_classes,
            seed=recipe.seed,
            augmentation=augmentation,
            mean=dataset.mean,
            std=dataset.std,
            device=self.device,
            dtype=self.amp_dtype,
            impl=recipe.impl,
            rank=self.processes.rank,
            world_size=self.processes.world_size,
            placement=recipe.data_placement,
        )

    @property
    def bad_steps(self) -> torch.Tensor:
        """How many steps were not finite, int64 []."""
        return self.update.bad_steps

    @property
    def first_bad(self) -> torch.Tensor:
        """The first such 0-based step, −1: none."""
        return self.update.first_bad

    def epoch(self, step: int) -> float:
        """Passes over the training images after so many steps."""
        return step / self.loader.steps_per_epoch

    def learning_rate(self, step: int) -> float:
        """That of a 0-based step."""
        recipe = self.recipe
        factor = self.rate_factor * transfer.phase_at(self.phases, step).factor
        return recipe.lr * factor * schedule.factor(recipe.sched, step, recipe.steps, recipe.warmup_steps)

    def train_step(self, step: int) -> None:
        """Trains on the global batch of this 0-based step."""
        with annotate("place"):
            self.place(step)
        with annotate("step"):
            (self.graph or self.compute)()

    def place(self, step: int) -> None:
        """Puts what the step takes from the host where `compute` reads it."""
        self._enter_phase(step)
        self.feed.put_all("plan", self.loader.plan(step))
        if self.answers is not None:
            self.feed.put("answers", self.answers.of_step(step))
        self.feed.number("step", step)
        self.feed.number("rate", self.learning_rate(step))
        if self.ema is not None:
            self.feed.number("share", self.ema.share(step))
        if self._has_dropout:
            torch.manual_seed((self.recipe.seed * 1_000_003 + step) * 4_096 + self.processes.rank)
        share = self.recipe.batch_size // self.processes.world_size
        if self.attack is not None:
            self.feed.put("start", self.attack.start(step, share, self.processes.rank))
        self.seen += share

    def compute(self) -> None:
        """The step's work on the device."""
        feed = self.feed
        with annotate("augment"):
            batch = self.loader.render(feed.take("plan", data.Plan))
        labels = batch.labels
        amp = self.amp_dtype != torch.float32
        images, changed = batch.images, None
        if self.attack is not None:
            with annotate("attack"):
                images, changed = self.attack.images(self.model, images, labels, feed["start"])
        with annotate("forward"), torch.autocast(self.device.type, self.amp_dtype, enabled=amp, cache_enabled=True):
            logits = self._forward(images)
            changed = None if changed is None else self._forward(changed)
        with annotate("loss"):
            loss = self._loss(logits.float(), batch)
            if self.teacher is not None:
                wanted = self.teacher.logits(batch.images) if self.answers is None else feed["answers"].float()
                learned = distillation_loss(logits.float(), wanted, self.recipe.kd_temperature)
                loss = torch.lerp(loss, learned, self.recipe.kd_weight)
            if changed is not None:
                loss = loss + self.attack.penalty(logits, changed)
        self.update(loss, feed["step"], feed["rate"])
        self.processes.average(self._unshared)
        if self.ema is not None:
            with annotate("average"):
                self.ema.update(feed["share"])
        self.loss_sum += loss.detach() * len(labels)
        self.correct += (logits.detach().argmax(1) == labels).sum()

    def _loss(self, logits: torch.Tensor, batch: data.Batch) -> torch.Tensor:
        smoothing = self.recipe.label_smoothing
        if batch.partner_labels is None:
            return F.cross_entropy(logits, batch.labels, label_smoothing=smoothing)
        own = F.cross_entropy(logits, batch.labels, reduction="none", label_smoothing=smoothing)
        partner = F.cross_entropy(logits, batch.partner_labels, reduction="none", label_smoothing=smoothing)
        return torch.lerp(own, partner, batch.partner_weight.to(own.dtype)).mean()

    def tick(self, step: int, steps: int, seconds: float) -> dict[str, float]:
        """Nothing more than every run has."""
        return {}

    def watch(self, row: dict[str, Any]) -> str | None:
        """What looks wrong in a row of metrics: nothing that is not checked elsewhere."""
        return None

    def restart_average(self) -> None:
        """Takes the network's present weights and statistics, put there from outside, for its first ones."""
        if self.ema is not None:
            self.ema.model.load_state_dict(self.model.state_dict())
        self.update.keep_buffers()

    def take_averages(self) -> dict[str, float]:
        """Mean loss and accuracy (percent) over the batches since the last call, of all processes."""
        sums = torch.stack([self.loss_sum, self.correct.double(), self.loss_sum.new_tensor(float(self.seen))])
        loss, correct, seen = self.processes.sum(sums).tolist()
        self.loss_sum.zero_()
        self.correct.zero_()
        self.seen = 0
        return {"train_loss": loss / max(seen, 1.0), "train_accuracy": 100.0 * correct / max(seen, 1.0)}

    @property
    def evaluated(self) -> nn.Module:
        """The network that is evaluated: the averaged one where there is one."""
        return self.model if self.ema is None else self.ema.model

    def evaluate(self, split: str, *, tta: bool = False) -> evaluation.Evaluation:
        """Loss and accuracy over the "train" or "test" images, un-augmented."""
        return evaluation.evaluate_split(
            self.evaluated, self.dataset, split, device=self.device, amp_dtype=self.amp_dtype, tta=tta
        )

    def evaluation_row(self) -> dict[str, float]:
        """What an evaluation adds to a row of metrics."""
        result = self.evaluate("test")
        return {"test_loss": result.loss, "test_accuracy": result.accuracy}

    def write_samples(self, folder: pathlib.Path, step: int) -> None:
        """A classifier draws nothing."""

    def summary(self) -> dict[str, Any]:
        """What the result of a run says of the trained network."""
        test, train = self.evaluate("test"), self.evaluate("train")
        found = {
            "train_accuracy": round(train.accuracy, 4),
            "test_accuracy": round(test.accuracy, 4),
            "train_loss": round(train.loss, 6),
            "test_loss": round(test.loss, 6),
        }
        if self.recipe.tta:
            found["test_accuracy_tta"] = round(self.evaluate("test", tta=True).accuracy, 4)
        return found

    def network_tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor of the network and of its average."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        if self.ema is not None:
            tensors |= {f"ema.{name}": tensor for name, tensor in self.ema.model.state_dict().items()}
        return tensors

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """All that the next steps depend on: tensors by name, and JSON values. All processes ask together."""
        tensors = self.network_tensors()
        tensors |= optimiser_tensors(self.optimiser, self.model, "optimiser")
        for name, own in (("loss_sum", self.loss_sum), ("correct", self.correct)):
            tensors[f"progress.{name}"] = self.processes.gather(own)
        tensors |= {"progress.bad_steps": self.update.bad_steps, "progress.first_bad": self.update.first_bad}
        scaler = self.update.scaler.state_dict() if self.update.scaler else None
        notes = {"seen": self.seen, "scaler": scaler, **moments(self.dataset)}
        return tensors, notes if self.teacher is None else notes | {"teacher_sha256": self.teacher.digest}

    def _check_teacher(self, checkpoint: Checkpoint) -> None:
        """The path may change, the teacher may not."""
        before, now = checkpoint.state.get("teacher_sha256"), self.teacher.digest if self.teacher else None
        if before != now and not self.recipe.eval_only:
            raise CheckpointError(
                f"{checkpoint.path} had a teacher of SHA-256 {str(before)[:12]}, --teacher {self.recipe.teacher} has "
                f"{str(now)[:12]}; pass the same one"
            )

    def load_state(self, checkpoint: Checkpoint) -> None:
        """Takes over everything of a checkpoint of the same recipe.

        Raises:
            CheckpointError: it belongs to another network or optimiser.
        """
        expected, _ = self.state()
        tensors = checkpoint.tensors
        missing = sorted(name for name in expected if name not in tensors)
        if missing:
            raise CheckpointError(f"{checkpoint.path} lacks {missing[0]!r}; it is of another recipe")
        self._check_teacher(checkpoint)
        if not self.recipe.eval_only:
            check_same_images(checkpoint, self.dataset)
        parts = by_part(tensors)
        self.model.load_state_dict(parts["model"])
        self.update.keep_buffers()
        if self.ema is not None:
            self.ema.model.load_state_dict(parts["ema"])
        load_optimiser(self.optimiser, self.model, parts.get("optimiser", {}))
        progress = parts["progress"]
        same = self.processes.take_own(self.loss_sum, progress["loss_sum"])
        self.processes.take_own(self.correct, progress["correct"])
        self.update.bad_steps.copy_(progress["bad_steps"])
        self.update.first_bad.copy_(progress["first_bad"])
        self.seen = checkpoint.state["seen"] if same else 0
        if self.update.scaler:
            self.update.scaler.load_state_dict(checkpoint.state["scaler"])
        if self.graph is not None:
            self.graph.reset()
