"""Adversarial training: generator against discriminator, one step, and the state that a checkpoint holds."""

from __future__ import annotations

import pathlib
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fastcifar import data
from fastcifar import nn as fused
from fastcifar.metrics import METRICS
from fastcifar.profiling import annotate
from fastcifar.training import distributed, environment, judging, sampling, schedule
from fastcifar.training.capture import Feed, build_graph
from fastcifar.training.checkpoint import Checkpoint, CheckpointError
from fastcifar.training.diff_augment import NUMBERS, diff_augment
from fastcifar.training.ema import WeightAverage
from fastcifar.training.gan import build_gan, discriminator_loss, generator_loss
from fastcifar.training.networks import check_same_images, moments
from fastcifar.training.optimisers import GuardedStep, build_optimiser
from fastcifar.training.options import Recipe
from fastcifar.training.recipe import names, policies
from fastcifar.training.state import by_part, load_optimiser, optimiser_tensors

# What a step is averaged over: names in metrics rows, in the order of the sums.
AVERAGES = (
    "loss_d", "loss_g", "score_real", "score_fake", "weight_real", "weight_fake", "cosine", "logit_real", "logit_fake",
    "deviation",
)  # fmt: skip
# Deviation of pixels in [−1, 1] over a batch, and scores through a sigmoid, beyond which a run has gone wrong.
COLLAPSED, SATURATED = 0.02, 0.995
_MEAN = _STD = (0.5, 0.5, 0.5)


class Adversarial:
    """A GAN in training; every step is a pure function of the state and the step's number.

    Args:
        recipe: with its budget resolved; `steps` counts those of the generator.
        dataset: images and labels.
        device: of the networks and the resident images.
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
        height, width = dataset.train_images.shape[1:3]
        if (height, width) != (32, 32):
            raise ValueError(f"--model {recipe.model} draws 32×32 images, {dataset.name} has {height}×{width}")
        self.recipe, self.dataset, self.device, self.processes = recipe, dataset, device, processes
        self.amp_dtype = environment.DTYPES[environment.choose_amp_dtype(recipe.amp_dtype, device)]
        self.model = build_gan(recipe, dataset.num_classes).to(device=device, memory_format=torch.channels_last)
        self.generator, self.discriminator = self.model.generator, self.model.discriminator
        self.ema = WeightAverage(self.generator, recipe.model_ema_decay) if recipe.model_ema_decay else None
        self.loss = recipe.loss if recipe.loss != "auto" else "bce" if recipe.model == "dcgan" else "aw_hinge"
        self.policies = policies(recipe.diffaugment)
        group = dist.group.WORLD if processes.world_size > 1 else None
        self._unshared: list[torch.Tensor] = []
        if group is not None:
            distributed.share_weights(self.model)
            self._unshared = distributed.share_statistics(self.model, synchronise=recipe.sync_bn)
        self.spectral = self._spectral_group()
        self.hinge = fused.AdaptiveWeightedHinge(self.discriminator.parameters(), process_group=group)
        self.update_g, self.update_d = (
            GuardedStep(build_optimiser(recipe, network), network, recipe.clip_grad, device, fp16=False)
            for network in (self.generator, self.discriminator)
        )
        self.rate_factor = 1.0
        self.sums = torch.zeros(len(AVERAGES), dtype=torch.float64, device=device)
        self.seen = 0
        self.loader = self._build_loader()
        self.feed = Feed(device, static=device.type == "cuda")
        self.graph, self.graph_notice = build_graph(self.compute, device, recipe, self.amp_dtype, processes.world_size)
        self.judge = self._build_judge()

    def _spectral_group(self) -> fused.SpectralNormGroup | None:
        try:
            return fused.SpectralNormGroup(self.discriminator)
        except ValueError:
            return None  # no such layer

    def _build_judge(self) -> judging.Judge | None:
        recipe = self.recipe
        wanted = names("--metrics", recipe.metrics, METRICS)
        if recipe.classifier is None and "fid" not in wanted:
            return None
        return judging.build_judge(
            self.dataset, self.device, wanted, classifier=recipe.classifier, count=recipe.metric_samples
        )

    def _build_loader(self) -> data.ResidentLoader:
        recipe, dataset = self.recipe, self.dataset
        return data.ResidentLoader(
            dataset.train_images,
            dataset.train_labels,
            batch_size=recipe.batch_size,
            num_classes=dataset.num_classes,
            seed=recipe.seed,
            augmentation=data.Augmentation(hflip=recipe.hflip),
            mean=_MEAN,
            std=_STD,
            device=self.device,
            dtype=torch.float32,
            impl=recipe.impl,
            rank=self.processes.rank,
            world_size=self.processes.world_size,
            placement=recipe.data_placement,
        )

    @property
    def bad_steps(self) -> torch.Tensor:
        """How many updates of either network were not finite, int64 []."""
        return self.update_g.bad_steps + self.update_d.bad_steps

    @property
    def first_bad(self) -> torch.Tensor:
        """The first such 0-based step, −1: none."""
        both = torch.stack([self.update_g.first_bad, self.update_d.first_bad])
        return torch.where((both >= 0).all(), both.min(), both.max())

    def epoch(self, step: int) -> float:
        """Passes of the discriminator over the training images after so many steps."""
        return step * self.recipe.n_dis / self.loader.steps_per_epoch

    def learning_rate(self, step: int) -> float:
        """That of a 0-based step."""
        recipe = self.recipe
        return recipe.lr * self.rate_factor * schedule.factor(recipe.sched, step, recipe.steps, recipe.warmup_steps)

    def place(self, step: int) -> None:
        """Puts what the step takes from the host where `compute` reads it."""
        feed, n_dis = self.feed, self.recipe.n_dis
        size = self.recipe.batch_size // self.processes.world_size
        begin = self.processes.rank * size
        # Latents, labels and augmentation numbers of each forward pass: functions of its place in the run.
        for turn in range(n_dis + 1):
            number = step * (n_dis + 1) + turn
            whole = sampling.draw(self.model, self.recipe.seed, number, self.recipe.batch_size, 2 * NUMBERS)
            feed.put_all(f"draw {turn}", whole.part(begin, begin + size))
        for turn in range(n_dis):
            feed.put_all(f"plan {turn}", self.loader.plan(step * n_dis + turn))
        feed.number("step", step)
        feed.number("rate", self.learning_rate(step))
        if self.ema is not None:
            feed.number("share", self.ema.share(step))
        self.seen += 1

    def _draw(self, turn: int) -> sampling.Draw:
        return self.feed.take(f"draw {turn}", sampling.Draw)

    def _autocast(self) -> torch.autocast:
        enabled = self.amp_dtype != torch.float32
        return torch.autocast(self.device.type, self.amp_dtype, enabled=enabled)

    def _judge_images(self, images: torch.Tensor, labels: torch.Tensor | None, numbers: torch.Tensor) -> torch.Tensor:
        images = diff_augment(images, self.policies, numbers) if self.policies else images
        images = images.contiguous(memory_format=torch.channels_last)
        with self._autocast():
            return self.discriminator(images, labels).float()

    def _generate(self, draw: sampling.Draw) -> torch.Tensor:
        with self._autocast():
            return self.generator(draw.latents, draw.labels).float()

    def train_step(self, step: int) -> None:
        """`n_dis` updates of the discriminator and one of the generator."""
        with annotate("place"):
            self.place(step)
        with annotate("step"):
            (self.graph or self.compute)()

    def compute(self) -> None:
        """The step's work on the device."""
        values: list[torch.Tensor] = []
        for turn in range(self.recipe.n_dis):
            with annotate("discriminator"):
                values = self._train_discriminator(turn)
        with annotate("generator"):
            loss_g = self._train_generator()
        self.processes.average(self._unshared)
        if self.ema is not None:
            self.ema.update(self.feed["share"])
        values.insert(1, loss_g)
        self.sums += torch.stack([value.detach().double() for value in values])

    def _train_discriminator(self, turn: int) -> list[torch.Tensor]:
        draw = self._draw(turn)
        with annotate("augment"):
            batch = self.loader.render(self.feed.take(f"plan {turn}", data.Plan))
        with torch.no_grad():
            generated = self._generate(draw)
        if self.spectral is not None:
            self.spectral.step()
        self.update_d.optimiser.zero_grad(set_to_none=True)
        labels = batch.labels if self.model.conditional else None
        real = self._judge_images(batch.images, labels, draw.numbers[:, :NUMBERS])
        fake = self._judge_images(generated, draw.labels, draw.numbers[:, NUMBERS:])
        if self.loss == "aw_hinge":
            found = self.hinge.backward(real, fake)
            loss = found.loss_real + found.loss_fake
            rest = [found.score_real, found.score_fake, found.weight_real, found.weight_fake, found.cosine]
        else:
            loss = discriminator_loss(self.loss, real, fake)
            loss.backward()
            self.processes.average_gradients(self.discriminator)
            one = torch.ones((), device=self.device)
            rest = [real.detach().sigmoid().mean(), fake.detach().sigmoid().mean(), one, one, 0 * one]
        self.update_d.apply(loss, self.feed["step"], self.feed["rate"])
        # How much the generated images differ from each other: next to nothing after a collapse.
        deviation = generated.std(0).mean()
        return [loss, *rest, real.detach().mean(), fake.detach().mean(), deviation]

    def _train_generator(self) -> torch.Tensor:
        draw = self._draw(self.recipe.n_dis)
        self.update_g.optimiser.zero_grad(set_to_none=True)
        self.discriminator.requires_grad_(False)
        try:
            fake = self._judge_images(self._generate(draw), draw.labels, draw.numbers[:, :NUMBERS])
            loss = generator_loss(self.loss, fake)
            loss.backward()
        finally:
            self.discriminator.requires_grad_(True)
        self.processes.average_gradients(self.generator)
        self.update_g.apply(loss, self.feed["step"], self.feed["rate"])
        return loss

    def take_averages(self) -> dict[str, float]:
        """Means over the steps since the last call; the scores are those of the raw logits through a sigmoid."""
        sums = self.processes.sum(self.sums.clone()) / self.processes.world_size
        means = (sums / max(self.seen, 1)).tolist()
        self.sums.zero_()
        self.seen = 0
        return {name: round(value, 6) for name, value in zip(AVERAGES, means, strict=True)}

    def tick(self, step: int, steps: int, seconds: float) -> dict[str, float]:
        """Of the last `steps` up to `step`: thousands of real images so far, seconds for a thousand, memory."""
        images = self.recipe.batch_size * self.recipe.n_dis / 1000
        found = {"kimg": round(step * images, 3), "seconds_per_kimg": round(seconds / max(steps * images, 1e-9), 3)}
        return found | {"memory_mib": environment.memory_mib(self.device)}

    def watch(self, row: dict[str, Any]) -> str | None:
        """What looks wrong in a row of metrics: a collapsed generator or a discriminator that has won."""
        if row["deviation"] < COLLAPSED:
            return (
                f"WARNING: the generated images hardly differ (deviation {row['deviation']:.4f}): the generator has "
                "collapsed; lower --lr, raise --n-dis or try --diffaugment translation,cutout"
            )
        if row["score_real"] > SATURATED and row["score_fake"] < 1 - SATURATED:
            return (
                f"WARNING: the discriminator tells all images apart (scores {row['score_real']:.3f} and "
                f"{row['score_fake']:.3f}): the generator learns nothing from it; lower --lr or --n-dis"
            )
        return None

    @property
    def evaluated(self) -> nn.Module:
        """The generator that is evaluated: the averaged one where there is one."""
        return self.generator if self.ema is None else self.ema.model

    def evaluation_row(self) -> dict[str, float]:
        """Metrics of fresh samples, where a classifier judges them."""
        return {} if self.judge is None else self.judge.metrics(self.evaluated, self.model)

    def write_samples(self, folder: pathlib.Path, step: int) -> None:
        """reals.png once, fakes-NNNNNN.png with the same latents and labels each time."""
        sampling.write_grids(folder, step, self.evaluated, self.model, self.dataset, self.device)

    def summary(self) -> dict[str, Any]:
        """What the result of a run says of the trained generator."""
        kind = {"loss": self.loss, "n_dis": self.recipe.n_dis, "conditional": self.model.conditional}
        if self.judge is None:
            return kind
        return kind | self.judge.describe() | self.evaluation_row()

    def restart_average(self) -> None:
        """Takes the networks' present weights and statistics, put there from outside, for their first ones."""
        if self.ema is not None:
            self.ema.model.load_state_dict(self.generator.state_dict())
        self._keep_buffers()

    def _keep_buffers(self) -> None:
        for _, update, _ in self._updates():
            update.keep_buffers()

    def network_tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor of both networks and of the generator's average."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        if self.ema is not None:
            tensors |= {f"ema.{name}": tensor for name, tensor in self.ema.model.state_dict().items()}
        return tensors

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """All that the next steps depend on: tensors by name, and JSON values. All processes ask together."""
        tensors = self.network_tensors()
        for name, update, network in self._updates():
            tensors |= optimiser_tensors(update.optimiser, network, f"optimiser_{name}")
            tensors |= {f"progress.bad_steps_{name}": update.bad_steps, f"progress.first_bad_{name}": update.first_bad}
        notes = {"seen": self.seen, "class_names": list(self.dataset.class_names), **moments(self.dataset)}
        if self.judge is not None:
            notes["extractor_sha256"] = self.judge.extractor.digest
        return tensors | {"progress.sums": self.processes.gather(self.sums)}, notes

    def _updates(self) -> list[tuple[str, GuardedStep, nn.Module]]:
        return [("g", self.update_g, self.generator), ("d", self.update_d, self.discriminator)]

    def load_state(self, checkpoint: Checkpoint) -> None:
        """Takes over everything of a checkpoint of the same recipe.

        Raises:
            CheckpointError: it belongs to another network or optimiser.
        """
        expected, _ = self.state()
        missing = sorted(name for name in expected if name not in checkpoint.tensors)
        if missing:
            raise CheckpointError(f"{checkpoint.path} lacks {missing[0]!r}; it is of another recipe")
        if not self.recipe.eval_only:
            check_same_images(checkpoint, self.dataset)
            if self.judge is not None:
                self.judge.check_same(checkpoint)
        parts = by_part(checkpoint.tensors)
        self.model.load_state_dict(parts["model"])
        self._keep_buffers()
        if self.ema is not None:
            self.ema.model.load_state_dict(parts["ema"])
        for name, update, network in self._updates():
            load_optimiser(update.optimiser, network, parts.get(f"optimiser_{name}", {}))
            update.bad_steps.copy_(parts["progress"][f"bad_steps_{name}"])
            update.first_bad.copy_(parts["progress"][f"first_bad_{name}"])
        same = self.processes.take_own(self.sums, parts["progress"]["sums"])
        self.seen = checkpoint.state["seen"] if same else 0
        if self.spectral is not None:
            self.spectral.invalidate()
        if self.graph is not None:
            self.graph.reset()
