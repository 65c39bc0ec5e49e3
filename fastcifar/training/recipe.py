"""From presets, configuration files and flags to one complete `Recipe`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from fastcifar import models, validation
from fastcifar.metrics import METRICS
from fastcifar.training import transfer
from fastcifar.training.checkpoint import Checkpoint, CheckpointError
from fastcifar.training.options import Recipe, flag

# The published recipe gives no strength for its colour jitter; 0.1 is ours.
_SEED = {
    "steps": 10_000, "batch_size": 512, "opt": "adam", "lr": 1e-3, "weight_decay": 0.0, "sched": "constant",
    "warmup_steps": 0, "crop_pad": 4, "crop_mode": "zero", "hflip": "random", "color_jitter": 0.1,
}  # fmt: skip
_FAST = {
    "steps": 10_000, "batch_size": 512, "opt": "sgd", "lr": 0.8, "weight_decay": 5e-4, "sched": "linear",
    "crop_pad": 4, "hflip": "alternating",
}  # fmt: skip
_DEMO = {
    "steps": 1_600, "batch_size": 128, "opt": "sgd", "lr": 0.4, "weight_decay": 5e-4, "sched": "linear",
    "hflip": "alternating",
}  # fmt: skip
_BEST = {**_FAST, "model_ema_decay": 0.999, "kd_temperature": 4.0, "kd_weight": 0.9, "tta": True}
# Published are 26 epochs over three augmented copies of the images and three phases of Adam; their lengths, their rates
# and the batch size are ours.
_MODIFY_RESNET = {**_SEED, "epochs": 78, "batch_size": 128, "phases": "16:1,6:0.1,4:0.01"}
# Rates of 2e-4, 5e-6 and 2e-6; where the second phase goes over from one to the other, and the batch size, are ours.
_XCEPTION = {
    "model": "xception", "backbone": "imagenet", "epochs": 46, "batch_size": 128, "opt": "adam", "lr": 2e-4,
    "phases": "20:1:frozen,13:0.025,13:0.01", "weight_decay": 0.0, "sched": "constant", "warmup_steps": 0,
    "crop_pad": 4, "hflip": "random",
}  # fmt: skip
# Page, How to train your ResNet, 2018, with more epochs than his 24.
_CIFAR10 = {
    "model": "resnet_cifar10", "dataset": "cifar10", "epochs": 30, "batch_size": 512, "opt": "sgd", "lr": 0.4,
    "weight_decay": 5e-4, "sched": "linear", "crop_pad": 4, "hflip": "alternating", "cutout": 8,
}  # fmt: skip
# Fewer epochs by what Page's last recipe (smoothing, averaging) and Jordan, 94 % on CIFAR-10 in 3.29 seconds, 2024
# (flips, small crops), do; their whitened first layers are not here.
_CIFAR10_SPEED = {
    **_CIFAR10, "epochs": 10, "cutout": 0, "crop_pad": 2, "label_smoothing": 0.2, "model_ema_decay": 0.99, "tta": True,
}  # fmt: skip
# Miyato et al., 2018, but for the discriminator's steps: the published run names none; 5 is theirs.
_GAN_SEED = {
    "steps": 50_000, "batch_size": 64, "opt": "adam", "lr": 2e-4, "momentum": 0.0, "beta2": 0.9, "weight_decay": 0.0,
    "sched": "linear", "warmup_steps": 0, "n_dis": 5,
}  # fmt: skip
_GAN_FAST = {
    **_GAN_SEED, "n_dis": 1, "lr": 4e-4, "hflip": "random", "model_ema_decay": 0.999,
    "diffaugment": "translation,cutout",
}  # fmt: skip
_GAN_DEMO = {**_GAN_FAST, "steps": 4_000, "diffaugment": "off"}
_GANS = {"seed": _GAN_SEED, "fast": _GAN_FAST, "demo": _GAN_DEMO}
# Radford, Metz and Chintala, 2016.
_DCGAN = {"momentum": 0.5, "beta2": 0.999, "n_dis": 1, "lr": 2e-4, "diffaugment": "off"}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "seed": _SEED, "fast": _FAST, "best": _BEST, "demo": _DEMO, "xception-transfer": _XCEPTION,
    "resnet_cifar10": _CIFAR10, "cifar10-speed": _CIFAR10_SPEED,
}  # fmt: skip

# A small plain network without batch norm diverges at the rates that the others learn fastest with.
_BY_MODEL = {
    "small_filters_cnn": {"fast": {"lr": 0.1}, "best": {"lr": 0.1}, "demo": {"lr": 0.1}},
    "modify_resnet": {"seed": _MODIFY_RESNET},
}
POLICIES = ("color", "translation", "cutout")
_CONFIG_LIMIT = 2**16
_WARMUP_SHARE = {"constant": 0.0, "cosine": 0.05, "linear": 0.2, "onecycle": 0.3}


def resolve(flags: Mapping[str, Any], config: Mapping[str, Any] | None = None, *, has_gpu: bool) -> Recipe:
    """One recipe out of, in rising priority: defaults, preset, configuration file, flags.

    Args:
        flags: options given on the command line, by field name of `Recipe`.
        config: options from a configuration file.
        has_gpu: what the preset "auto" rests on.

    Returns:
        A recipe whose preset is a real one; `steps` stays None where `epochs` is given.

    Raises:
        ValueError: an unknown option, preset or model, a value out of range, or options that exclude each other.
    """
    config = dict(config or {})
    names = [f.name for f in dataclasses.fields(Recipe)]
    for key in config:
        validation.choose("option in the configuration file", key, names)
    given = {**config, **flags}
    if flags.get("steps") is not None or flags.get("epochs") is not None:
        other = "epochs" if flags.get("steps") is not None else "steps"
        if flags.get(other) is None:
            given.pop(other, None)
    if given.get("steps") is not None and given.get("epochs") is not None:
        raise ValueError(f"--steps {given['steps']} and --epochs {given['epochs']} exclude each other; give one")
    base = _base(given, has_gpu)
    preset = base.pop("preset")
    if given.get("steps") is not None:
        base.pop("epochs", None)
    elif given.get("epochs") is not None or "epochs" in base:
        base.pop("steps", None)
    if given.get("init_weights") is not None:
        base.pop("backbone", None)
    recipe = Recipe(**{**base, **given, "preset": preset})
    _check_together(recipe)
    return recipe


def _base(given: Mapping[str, Any], has_gpu: bool) -> dict[str, Any]:
    """The options of the preset, under "preset" its real name."""
    model = validation.choose("model", given.get("model", Recipe.model), models.list_models())
    preset = given.get("preset", "auto")
    if preset == "auto":
        preset = "xception-transfer" if model == "xception" else "fast" if has_gpu else "demo"
    validation.choose("--preset", preset, PRESETS)
    own = PRESETS[preset].get("model", model)
    if "model" in given and model != own:
        raise ValueError(f"--preset {preset} is for {own}, not for {model}; drop --model, or choose another preset")
    if own not in models.list_models(gan=True):
        return {**PRESETS[preset], **_BY_MODEL.get(own, {}).get(preset, {}), "preset": preset}
    if preset not in _GANS:
        raise ValueError(f"--preset {preset} is for classifiers, {model} is a GAN; use {', '.join(_GANS)}")
    return {**_GANS[preset], **(_DCGAN if model == "dcgan" else {}), "preset": preset}


def _check_together(recipe: Recipe) -> None:
    if recipe.resume not in (None, "auto") and recipe.init_weights:
        raise ValueError("--resume continues a whole run and --init-weights starts a new one; give one of them")
    if recipe.eval_only and not (recipe.resume or recipe.init_weights):
        raise ValueError("--eval-only needs weights: give --resume or --init-weights")
    if recipe.mixup and recipe.cutmix:
        raise ValueError(f"--mixup {recipe.mixup:g} and --cutmix {recipe.cutmix:g} exclude each other; set one to 0")
    if recipe.adversarial != "off" and (recipe.mixup or recipe.cutmix or recipe.model in models.list_models(gan=True)):
        raise ValueError(f"--adversarial {recipe.adversarial} is for classifiers, without --mixup and --cutmix")
    if recipe.init_weights and recipe.backbone:
        raise ValueError("--init-weights gives all weights and --backbone all but the head's; give one of them")
    if recipe.preset == "best" and not recipe.teacher:
        raise ValueError(
            "--preset best learns from a teacher: give --teacher RUN, a classifier's run folder, or use --preset fast"
        )
    if recipe.kd_cache:
        _check_cache(recipe)
    if recipe.phases:
        transfer.read_phases(recipe.phases)
    if recipe.model in models.list_models(gan=True):
        _check_gan(recipe)
    elif recipe.unconditional or recipe.loss != "auto" or recipe.diffaugment != "off":
        raise ValueError(
            f"--unconditional, --loss and --diffaugment are for GANs ({', '.join(models.list_models(gan=True))}), "
            f"{recipe.model} is a classifier"
        )
    if recipe.sched == "constant" and recipe.opt == "sgd" and recipe.lr == 0.0:
        raise ValueError("--lr 0 trains nothing; give a rate above 0")


def _check_cache(recipe: Recipe) -> None:
    if not recipe.teacher:
        raise ValueError("--kd-cache keeps a teacher's answers: give --teacher RUN")
    for option in ("color_jitter", "cutout", "mixup", "cutmix"):
        if getattr(recipe, option):
            raise ValueError(
                f"--kd-cache knows crops and flips alone, and {flag(option)} is {getattr(recipe, option):g}; set it "
                "to 0, or drop --kd-cache"
            )


_GAN_OPTIONS = ("unconditional", "loss", "n_dis", "diffaugment", "classifier", "metrics", "metric_samples")
_NEEDED = {
    "adversarial": ("adversarial_eps", "adversarial_step_size", "adversarial_steps", "trades_beta"),
    "teacher": ("kd_temperature", "kd_weight"),
}


def check_effect(flags: Mapping[str, Any], recipe: Recipe) -> None:
    """What a user asks for must have an effect; what a checkpoint or a file brings along need not.

    Args:
        flags: options given on the command line, by field name.
        recipe: that they led to.

    Raises:
        ValueError: an option that this recipe does not look at; the message says what is missing.
    """
    gans = models.list_models(gan=True)
    for option in _GAN_OPTIONS if recipe.model not in gans else ():
        if flags.get(option) not in (None, False):
            raise ValueError(f"{flag(option)} is for GANs ({', '.join(gans)}), {recipe.model} is a classifier")
    for needed, options in _NEEDED.items():
        given = [option for option in options if option in flags]
        if given and needed not in flags and getattr(recipe, needed) in (None, "off"):
            raise ValueError(f"{flag(given[0])} does nothing without {flag(needed)}; give both or neither")


def _check_gan(recipe: Recipe) -> None:
    for option in ("mixup", "cutmix", "cutout", "color_jitter", "label_smoothing", "crop_pad"):
        if getattr(recipe, option):
            raise ValueError(f"{flag(option)} is for classifiers; {recipe.model} would learn to draw it")
    for option in ("phases", "teacher", "backbone"):
        if getattr(recipe, option):
            raise ValueError(f"{flag(option)} is for classifiers, {recipe.model} is a GAN")
    if recipe.amp_dtype == "fp16":
        raise ValueError("--amp-dtype fp16 is not for GANs: two losses share no scale; use bf16 or fp32")
    if recipe.compile:
        raise ValueError(f"--compile is for classifiers; {recipe.model} runs its fused operators without")
    if recipe.tta:
        raise ValueError(f"--tta is for classifiers, not for {recipe.model}")
    if recipe.opt == "sgd":
        raise ValueError("--opt sgd does not train GANs here; use adam or adamw")
    policies(recipe.diffaugment)
    names("--metrics", recipe.metrics, METRICS)


def names(option: str, text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """A list with commas as a tuple of known names.

    Raises:
        ValueError: an unknown name; the message gives the nearest.
    """
    return tuple(validation.choose(option, part.strip(), known) for part in text.split(",") if part.strip())


def policies(text: str) -> tuple[str, ...]:
    """--diffaugment as a tuple of policies, empty for "off"."""
    return () if text == "off" else names("--diffaugment", text, POLICIES)


def with_budget(recipe: Recipe, images: int) -> Recipe:
    """The recipe with `steps`, `warmup_steps` and `eval_every` as numbers, for a training set of so many images.

    Raises:
        ValueError: more warm-up steps than steps.
    """
    seen = recipe.batch_size * recipe.n_dis
    steps = recipe.steps if recipe.epochs is None else max(1, math.ceil(recipe.epochs * images / seen))
    warmup = recipe.warmup_steps
    if warmup is None:
        warmup = round(_WARMUP_SHARE[recipe.sched] * steps)
    elif warmup > steps:
        raise ValueError(f"{flag('warmup_steps')} {warmup} exceeds the run's {steps} steps")
    every = recipe.eval_every
    if every is None:
        every = math.ceil(steps / 5)
    return dataclasses.replace(recipe, steps=steps, epochs=None, warmup_steps=warmup, eval_every=every or steps)


def of_checkpoint(saved: Checkpoint, **changes: Any) -> Recipe:
    """The recipe of the run that a checkpoint belongs to, with some options changed.

    Raises:
        CheckpointError: it holds none, or one that this version does not know.
    """
    try:
        return Recipe(**{**saved.config, **changes})
    except (TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{saved.path}/checkpoint.json holds options that this version does not know ({error}); update fastcifar"
        ) from error


def read_config(path: str) -> dict[str, Any]:
    """A YAML or JSON configuration file: a table of option names and values.

    Raises:
        ValueError: not a table, not valid YAML, too large, or with aliases.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        raw = file.read(_CONFIG_LIMIT + 1)
    if len(raw) > _CONFIG_LIMIT:
        raise ValueError(f"--config {path}: more than {_CONFIG_LIMIT} bytes are no configuration")
    try:
        import yaml
    except ImportError as error:
        raise ValueError(f"--config {path}: needs PyYAML, which is not installed; run `pip install PyYAML`") from error
    try:
        text = raw.decode()
        _refuse_bombs(yaml, text)
        table = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"--config {path}: not valid YAML: {reason}") from error
    if table is None:
        return {}
    if not isinstance(table, dict) or not all(isinstance(key, str) for key in table):
        raise ValueError(f"--config {path}: must be a table of option names and values")
    return {key.replace("-", "_"): value for key, value in table.items()}


def _refuse_bombs(yaml: Any, text: str) -> None:
    """A few aliases of aliases stand for more values than there is memory; deep nesting takes hours to read."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or depth > 10:
            raise ValueError("aliases and deep nesting are not allowed")


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The options of two runs that decide their weights and differ, as "name: old → new".

    An option that the old run did not know has its default there, which is what was done before it existed.
    """
    old = {**dataclasses.asdict(Recipe()), **old}
    return [
        f"{key}: {old.get(key)!r} → {new.get(key)!r}"
        for key in sorted({*old, *new} - _WITHOUT_CONSEQUENCE)
        if old.get(key) != new.get(key)
    ]


_WITHOUT_CONSEQUENCE = frozenset(
    "data_dir data_placement preset device impl compile cuda_graph nvtx profile deterministic output resume "
    "init_weights backbone teacher save_every keep_last eval_every eval_only tta nan tensorboard wandb classifier "
    "metrics metric_samples".split()
)
