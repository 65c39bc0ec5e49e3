"""`python -m fastcifar.evaluate`: accuracy of a trained classifier by class, or metrics of a GAN's samples."""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import numpy
import torch
from torch import nn

from fastcifar import command_line, data, metrics, models, validation
from fastcifar.training import (
    cas,
    checkpoint,
    confusion,
    environment,
    evaluation,
    judging,
    networks,
    recipe,
    robustness,
    sampling,
)
from fastcifar.training.gan import load_gan
from fastcifar.training.options import Recipe
from fastcifar.training.recipe import names

# What --metrics knows: those of features, the distance to the nearest training image, a classifier trained on samples.
METRICS = (*metrics.METRICS, "lpips-nn", "cas")
# Samples that lpips-nn compares at most, rows of its sheet, neighbours of each.
_COMPARED, _ROWS, _NEIGHBOURS = 1000, 16, 5


def _parser() -> command_line.Parser:
    parser = command_line.Parser(
        prog="python -m fastcifar.evaluate",
        description="Evaluates a checkpoint. The last line printed is the result, one JSON object.",
    )
    parser.add_argument("--checkpoint", required=True, metavar="PATH", help="a checkpoint or a run folder")
    parser.add_argument("--dataset", help="default: the one that the checkpoint was trained on")
    parser.add_argument("--data-dir", metavar="DIR", help="folder of the CIFAR archives or folders")
    parser.add_argument("--split", default="test", help="the real images: test or train")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--impl", default="auto", help="implementation of the fused operators")
    parser.add_argument("--output", metavar="DIR", help="for the JSON and the picture; default: the run folder")
    classifier = parser.add_argument_group("of a classifier")
    classifier.add_argument("--amp-dtype", default="auto", help="auto, bf16, fp16 or fp32")
    classifier.add_argument("--tta", action="store_true", help="also with mirrored and shifted copies of each image")
    classifier.add_argument(
        "--pgd", action="store_true", help="also under attack: 20 steps of 2/255 within 8/255, from a random start"
    )
    classifier.add_argument("--pgd-eps", type=command_line.number, default=8 / 255, help="largest change of a pixel")
    classifier.add_argument("--pgd-steps", type=command_line.whole_number, default=20, help="of --pgd")
    classifier.add_argument("--pgd-images", type=command_line.whole_number, help="the first so many; default: all")
    gan = parser.add_argument_group("of a GAN")
    gan.add_argument("--metrics", help=f"{', '.join(METRICS)}, with commas between; default: fid,kid,prdc")
    gan.add_argument("--samples", type=command_line.whole_number, default=10_000, help="default: 10,000")
    gan.add_argument(
        "--seed", type=command_line.whole_number, default=0, help="of the samples, and of the start of --pgd"
    )
    gan.add_argument("--classifier", metavar="RUN", help="judge in this classifier's features, not in Inception's")
    gan.add_argument("--inception-weights", metavar="FILE", help="default: the cache folder, else a download")
    gan.add_argument("--lpips-weights", metavar="FILE", help="of lpips-nn; default: the cache folder")
    gan.add_argument("--cas-steps", type=command_line.whole_number, help="of the classifier that cas trains")
    gan.add_argument("--no-average", action="store_true", help="the last weights instead of the averaged ones")
    return parser


def _check(parsed: argparse.Namespace, chosen: Recipe) -> None:
    """What fits a classifier does not fit a GAN."""
    gan = chosen.model in models.list_models(gan=True)
    for option in ("metrics", "classifier", "inception_weights", "lpips_weights", "cas_steps", "no_average"):
        if not gan and getattr(parsed, option):
            raise ValueError(
                f"--{option.replace('_', '-')} is for GANs, {parsed.checkpoint} holds the classifier {chosen.model}"
            )
    for option in ("tta", "pgd"):
        if gan and getattr(parsed, option):
            raise ValueError(f"--{option} is for classifiers, {parsed.checkpoint} holds the GAN {chosen.model}")
    if parsed.pgd_steps < 1 or (parsed.pgd_images is not None and parsed.pgd_images < 1):
        raise ValueError(f"--pgd-steps and --pgd-images must be ≥ 1, got {parsed.pgd_steps} and {parsed.pgd_images}")
    if not 0 < parsed.pgd_eps <= 1:
        raise ValueError(f"--pgd-eps must be in (0, 1], such as 8/255, got {parsed.pgd_eps:g}")
    if parsed.samples < 2:
        raise ValueError(f"--samples must be ≥ 2, got {parsed.samples}")
    if parsed.cas_steps is not None and parsed.cas_steps < 1:
        raise ValueError(f"--cas-steps must be ≥ 1, got {parsed.cas_steps}")


def _classifier(
    parsed: argparse.Namespace,
    saved: checkpoint.Checkpoint,
    chosen: Recipe,
    dataset: data.ImageDataset,
    device: torch.device,
    output: pathlib.Path,
) -> dict[str, Any]:
    dataset = networks.as_trained(dataset, saved)
    model = networks.build_model(chosen, dataset)
    networks.load_weights(model, saved)
    model = model.to(device=device, memory_format=torch.channels_last)
    amp_dtype = environment.DTYPES[environment.choose_amp_dtype(parsed.amp_dtype, device)]
    settings = {"device": device, "amp_dtype": amp_dtype}
    measured = evaluation.evaluate_split(model, dataset, parsed.split, **settings)
    labels = getattr(dataset, f"{parsed.split}_labels")
    matrix = confusion.confusion_matrix(numpy.asarray(labels), measured.predictions.numpy(), dataset.num_classes)
    by_class = confusion.accuracy_by_class(matrix)
    print(confusion.table(by_class, dataset.class_names, matrix))
    result = {
        "images": len(labels),
        "accuracy": round(measured.accuracy, 4),
        "loss": round(measured.loss, 6),
    }
    if parsed.tta:
        views = evaluation.evaluate_split(model, dataset, parsed.split, tta=True, **settings)
        result["accuracy_tta"] = round(views.accuracy, 4)
    if parsed.pgd:
        result |= _under_attack(parsed, model, dataset, device)
    title = f"{chosen.model}, step {saved.step}, {dataset.name} {parsed.split}: {measured.accuracy:.2f} %"
    picture = output / "confusion.png"
    missing = confusion.draw(matrix, dataset.class_names, picture, title)
    print(missing or f"confusion matrix: {picture}")
    classes = {
        name: None if math.isnan(value) else round(value, 4)
        for name, value in zip(dataset.class_names, by_class, strict=True)
    }
    return result | {"accuracy_by_class": classes, "confusion": matrix.tolist()}


def _under_attack(parsed: argparse.Namespace, model: nn.Module, dataset: data.ImageDataset, device) -> dict[str, Any]:
    attacked = robustness.robust_evaluation(
        model, dataset, parsed.split, device=device, radius=parsed.pgd_eps, steps=parsed.pgd_steps,
        count=parsed.pgd_images, seed=parsed.seed,
    )  # fmt: skip
    return {
        "accuracy_pgd": round(attacked.accuracy, 4),
        "pgd_steps": parsed.pgd_steps,
        "pgd_eps": round(parsed.pgd_eps, 6),
        "pgd_images": len(attacked.predictions),
    }


def _gan(
    parsed: argparse.Namespace,
    saved: checkpoint.Checkpoint,
    chosen: Recipe,
    dataset: data.ImageDataset,
    device: torch.device,
    output: pathlib.Path,
) -> dict[str, Any]:
    wanted = names("--metrics", parsed.metrics or ("fd" if parsed.classifier else "fid") + ",kid,prdc", METRICS)
    gan, class_names = load_gan(saved, chosen, average=not parsed.no_average)
    names_differ = "cas" in wanted and tuple(class_names) != tuple(dataset.class_names)
    if gan.conditional and (names_differ or len(class_names) != dataset.num_classes):
        raise ValueError(
            f"{saved.path} draws {len(class_names)} classes ({', '.join(class_names[:3])}, …), {dataset.name} has "
            f"{dataset.num_classes} ({', '.join(dataset.class_names[:3])}, …); give its data set"
        )
    if "cas" in wanted and not gan.conditional:
        raise ValueError(f"cas needs a GAN that was trained with classes, {saved.path} was trained without; drop it")
    lpips = metrics.Lpips(parsed.lpips_weights, device) if "lpips-nn" in wanted else None
    of_features = tuple(name for name in wanted if name in metrics.METRICS)
    judge = None
    if of_features:
        judge = judging.build_judge(
            dataset,
            device,
            of_features,
            classifier=parsed.classifier,
            inception=parsed.inception_weights,
            count=parsed.samples,
            split=parsed.split,
        )
    gan = gan.to(device)
    result: dict[str, Any] = {"conditional": gan.conditional, "samples": parsed.samples, "seed": parsed.seed}
    if judge is not None:
        for text in judge.warnings():
            print(text)
        found = judge.metrics(gan.generator, gan, parsed.seed)
        result |= judge.describe() | {name: round(value, 6) for name, value in found.items()}
    if lpips is not None:
        figures, rows = judging.nearest_training_images(
            lpips, gan, dataset, min(parsed.samples, _COMPARED), neighbours=_NEIGHBOURS, seed=parsed.seed
        )
        sheet = output / "nearest.png"
        sampling.save_png(sheet, sampling.grid(rows[: _ROWS * (_NEIGHBOURS + 1)], _NEIGHBOURS + 1))
        print(f"samples and their nearest training images: {sheet}")
        result |= figures
    if "cas" in wanted:
        result |= cas.classification_accuracy_score(
            gan.generator, gan, dataset, parsed.samples, device, seed=parsed.seed, steps=parsed.cas_steps
        )
    return result


def main(arguments: Sequence[str]) -> int:
    """Evaluates as the arguments say; returns the exit status.

    Raises:
        ValueError, OSError: a mistake of the user; the message says what to do.
    """
    parsed = _parser().parse_args(arguments)
    validation.choose("--split", parsed.split, ("test", "train"))
    validation.choose("--amp-dtype", parsed.amp_dtype, ("auto", *environment.DTYPES))
    validation.check_implementation("--impl", parsed.impl)
    device = environment.choose_device(parsed.device)
    environment.prepare_process(device, deterministic=False)
    saved = checkpoint.find(parsed.checkpoint, notify=print)
    chosen = recipe.of_checkpoint(saved, impl=parsed.impl, device=parsed.device)
    _check(parsed, chosen)
    dataset = data.load_dataset(parsed.dataset or chosen.dataset, parsed.data_dir or chosen.data_dir)
    for notice in dataset.notices:
        print(notice)
    output = pathlib.Path(parsed.output) if parsed.output else checkpoint.run_folder(saved.path)
    output.mkdir(parents=True, exist_ok=True)
    result = {
        "checkpoint": str(saved.path),
        "step": saved.step,
        "model": chosen.model,
        "dataset": dataset.name,
        "synthetic": dataset.synthetic,
        "split": parsed.split,
    }
    started = time.perf_counter()
    measure = _gan if chosen.model in models.list_models(gan=True) else _classifier
    result |= measure(parsed, saved, chosen, dataset, device, output)
    result["seconds"] = round(time.perf_counter() - started, 1)
    (output / "evaluation.json").write_text(json.dumps(result) + "\n")
    print(json.dumps({name: value for name, value in result.items() if name not in _LONG}), flush=True)
    return 0


# Written to the file, too long for a terminal.
_LONG = ("accuracy_by_class", "confusion")


if __name__ == "__main__":
    command_line.run("python -m fastcifar.evaluate", main)
