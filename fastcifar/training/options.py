"""Every training option, once: default, help, range. The command line and the configuration files are made of it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from fastcifar import validation
from fastcifar.data.shard import PLACEMENTS


def _option(default: Any, help: str, group: str, kind: type = str, **limits: Any) -> Any:
    return field(default=default, metadata={"help": help, "group": group, "kind": kind, **limits})


def _number(default: float | None, help: str, group: str, low: float, high: float = math.inf) -> Any:
    return _option(default, help, group, float, low=low, high=high)


def _count(default: int | None, help: str, group: str, low: int = 0) -> Any:
    return _option(default, help, group, int, low=low, high=2**31)


_WHAT, _BUDGET, _OPTIMISER, _DATA, _GAN = "what", "budget", "optimiser", "augmentation", "generation"
_LOSSES = ("auto", "hinge", "aw_hinge", "bce", "nonsaturating")
_ROBUST = "adversarial training"
_PRESETS = ("auto", "seed", "fast", "best", "demo", "xception-transfer", "resnet_cifar10", "cifar10-speed")
_DISTILLATION = "distillation"
_SPEED, _LIFE, _LOGS = "speed and repeatability", "life cycle", "logs"


@dataclass(frozen=True)
class Recipe:
    """All options of one training run. None means: decided by the preset, the data set or the device.

    Raises:
        ValueError: an option of the wrong type or out of its range; the message names option, value and range.
    """

    model: str = _option("ds_resnet", "name of the network", _WHAT)
    model_options: dict = field(default_factory=dict)
    dataset: str = _option("auto", "auto, cifar100, cifar10, synthetic, folder:PATH or npz:PATH", _WHAT)
    data_dir: str | None = _option(None, "folder of the CIFAR archives or folders", _WHAT)
    holdout: int = _count(0, "training images to hold out and test on, in place of the test images", _WHAT)
    preset: str = _option("auto", "recipe to start from", _WHAT, choices=_PRESETS)

    steps: int | None = _count(None, "optimiser steps", _BUDGET, 1)
    epochs: float | None = _number(None, "passes over the training images, instead of --steps", _BUDGET, 1e-9)
    batch_size: int = _count(512, "images in a step, over all processes", _BUDGET, 1)

    opt: str = _option("sgd", "optimiser; sgd has Nesterov momentum", _OPTIMISER, choices=("sgd", "adam", "adamw"))
    lr: float = _number(0.4, "highest learning rate", _OPTIMISER, 0.0)
    momentum: float = _number(0.9, "of sgd; the first beta of adam and adamw", _OPTIMISER, 0.0, 0.999999)
    beta2: float = _number(0.999, "the second beta of adam and adamw", _OPTIMISER, 0.0, 0.9999999)
    weight_decay: float = _number(5e-4, "on tensors of two or more dimensions only", _OPTIMISER, 0.0)
    sched: str = _option(
        "linear", "learning rate over time", _OPTIMISER, choices=("constant", "cosine", "linear", "onecycle")
    )
    warmup_steps: int | None = _count(None, "steps of rising learning rate; default: by preset", _OPTIMISER)
    label_smoothing: float = _number(0.0, "share of the target spread over all classes", _OPTIMISER, 0.0, 0.999999)
    phases: str | None = _option(
        None,
        "parts of the run, LENGTH:FACTOR or LENGTH:FACTOR:frozen with commas between: they share the steps in "
        "proportion to their lengths, FACTOR multiplies the learning rate, frozen trains the head alone",
        _OPTIMISER,
    )
    clip_grad: float = _number(0.0, "largest gradient norm; 0 for no limit", _OPTIMISER, 0.0)
    model_ema_decay: float = _number(0.0, "decay of the averaged weights; 0 for none", _OPTIMISER, 0.0, 0.9999999)

    crop_pad: int = _count(0, "pixels of padding for random crops", _DATA)
    crop_mode: str = _option("reflect", "what the padding holds", _DATA, choices=("reflect", "zero"))
    hflip: str = _option("off", "horizontal flips", _DATA, choices=("alternating", "random", "off"))
    color_jitter: float = _number(0.0, "strength of brightness, contrast and saturation jitter", _DATA, 0.0, 1.0)
    cutout: int = _count(0, "side of the square that is cut out, in pixels", _DATA)
    mixup: float = _number(0.0, "alpha of mixup; 0 for none", _DATA, 0.0)
    cutmix: float = _number(0.0, "alpha of cutmix; 0 for none", _DATA, 0.0)

    adversarial: str = _option("off", "train on adversarial images", _ROBUST, choices=("off", "pgd", "trades"))
    adversarial_eps: float = _number(8 / 255, "largest change of a pixel in [0, 1]", _ROBUST, 0.0, 1.0)
    adversarial_step_size: float = _number(2 / 255, "change of a pixel in a step of the attack", _ROBUST, 0.0, 1.0)
    adversarial_steps: int = _count(10, "steps of the attack", _ROBUST, 1)
    trades_beta: float = _number(6.0, "weight of the divergence that trades adds", _ROBUST, 0.0)

    teacher: str | None = _option(None, "run of a classifier whose answers are learned too", _DISTILLATION)
    kd_temperature: float = _number(4.0, "both answers are softened by", _DISTILLATION, 1e-9)
    kd_weight: float = _number(0.9, "share of the teacher's answers in the loss", _DISTILLATION, 0.0, 1.0)
    kd_cache: bool = _option(
        False,
        "keep the teacher's answers to all crops and flips in a file; pays from the second run on",
        _DISTILLATION,
        bool,
    )

    unconditional: bool = _option(False, "a GAN that knows no classes", _GAN, bool)
    loss: str = _option("auto", "of a GAN; auto: aw_hinge, bce for dcgan", _GAN, choices=_LOSSES)
    n_dis: int = _count(1, "discriminator steps for each generator step", _GAN, 1)
    diffaugment: str = _option("off", "DiffAugment: off, or color, translation, cutout with commas between", _GAN)
    classifier: str | None = _option(None, "run of a classifier whose features judge the samples", _GAN)
    metrics: str = _option("fd", "at evaluations: fd, kid, prdc with --classifier, fid without; commas between", _GAN)
    metric_samples: int = _count(10_000, "images that the metrics see", _GAN, 2)

    device: str = _option("auto", "auto, cpu, cuda or cuda:N", _SPEED)
    amp_dtype: str = _option("auto", "arithmetic of the network", _SPEED, choices=("auto", "bf16", "fp16", "fp32"))
    impl: str = _option("auto", "implementation of the fused operators", _SPEED, choices=validation.IMPLEMENTATIONS)
    sync_bn: bool = _option(True, "with several processes: batch norm over the global batch", _SPEED, bool)
    data_placement: str = _option(
        "replicated", "training images on the devices: all on each, or a part on each", _SPEED, choices=PLACEMENTS
    )
    cuda_graph: bool | None = _option(
        None, "replay each step as one CUDA graph; default: where it can be, on a single GPU", _SPEED, bool
    )
    nvtx: bool = _option(False, "NVTX ranges of steps, phases and operators, for nsys and ncu", _SPEED, bool)
    profile: bool = _option(False, "profile some steps: profile/ in the run folder", _SPEED, bool)
    compile: bool = _option(False, "torch.compile the network", _SPEED, bool)
    seed: int = _count(0, "of weights, order and augmentation", _SPEED)
    deterministic: bool = _option(False, "only deterministic algorithms", _SPEED, bool)

    output: str | None = _option(None, "run folder; default: runs/ and a name made of the options", _LIFE)
    resume: str | None = _option(None, "auto, or the checkpoint or run folder to go on from", _LIFE)
    init_weights: str | None = _option(None, "checkpoint or run folder to take the first weights from", _LIFE)
    backbone: str | None = _option(
        None,
        "first weights of all but the head: a run, a file of tensors, imagenet (published, for xception) or none",
        _LIFE,
    )
    save_every: int = _count(500, "steps between checkpoints; 0 for the last only", _LIFE)
    keep_last: int = _count(2, "checkpoints that are kept", _LIFE, 1)
    eval_every: int | None = _count(None, "steps between evaluations; default: five in a run; 0 for the last", _LIFE)
    eval_only: bool = _option(False, "evaluate the weights of --resume or --init-weights, train nothing", _LIFE, bool)
    tta: bool = _option(False, "also evaluate with mirrored and shifted copies of each image", _LIFE, bool)
    nan: str = _option("stop", "on a loss or gradient that is not finite", _LIFE, choices=("stop", "skip", "rollback"))

    tensorboard: bool = _option(False, "also log to TensorBoard", _LOGS, bool)
    wandb: bool = _option(False, "also log to Weights & Biases", _LOGS, bool)

    def __post_init__(self) -> None:
        for option in options():
            _check(option, getattr(self, option.name))
        if not isinstance(self.model_options, dict):
            raise ValueError(f"model_options must be a table of names and values, got {self.model_options!r}")


def options() -> tuple[dataclasses.Field, ...]:
    """The fields of `Recipe` that a command line can set, in order; `metadata` holds help, group, kind and limits."""
    return tuple(f for f in dataclasses.fields(Recipe) if f.metadata)


def flag(name: str) -> str:
    """The command-line spelling of an option's name."""
    return "--" + name.replace("_", "-")


def _check(option: dataclasses.Field, value: Any) -> None:
    if value is None and option.default is None:
        return
    kind, limits = option.metadata["kind"], option.metadata
    name = flag(option.name)
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        noun = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[kind]
        raise ValueError(f"{name} must be {noun}, got {value!r}")
    if "choices" in limits:
        validation.choose(name, value, limits["choices"])
    if "low" in limits and not limits["low"] <= value <= limits["high"]:
        raise ValueError(f"{name} must be {_range(limits['low'], limits['high'])}, got {value!r}")
    if kind is float and not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value!r}")


def _range(low: float, high: float) -> str:
    lowest = "> 0" if low == 1e-9 else f"≥ {low:g}"
    return lowest if high in (math.inf, 2**31) else f"in [{low:g}, {high:g}]" if high == 1.0 else f"in [{low:g}, 1)"
