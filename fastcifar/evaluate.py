"""`python -m fastcifar.evaluate`: accuracy, accuracy by class and the confusion matrix of a trained classifier."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence

import numpy
import torch

from fastcifar import command_line, data, models, validation
from fastcifar.training import checkpoint, classify, confusion, environment, evaluation, loop
from fastcifar.training.options import Recipe


def _parser() -> command_line.Parser:
    parser = command_line.Parser(
        prog="python -m fastcifar.evaluate",
        description="Evaluates a checkpoint. The last line printed is the result, one JSON object.",
    )
    parser.add_argument("--checkpoint", required=True, metavar="PATH", help="a checkpoint or a run folder")
    parser.add_argument("--dataset", help="default: the one that the checkpoint was trained on")
    parser.add_argument("--data-dir", metavar="DIR", help="folder of the CIFAR archives or folders")
    parser.add_argument("--split", default="test", help="test or train")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--amp-dtype", default="auto", help="auto, bf16, fp16 or fp32")
    parser.add_argument("--impl", default="auto", help="implementation of the fused operators")
    parser.add_argument("--tta", action="store_true", help="also with mirrored and shifted copies of each image")
    parser.add_argument("--output", metavar="DIR", help="for the JSON and the picture; default: the run folder")
    return parser


def _refuse_gan(chosen: Recipe, saved: checkpoint.Checkpoint) -> None:
    if chosen.model in models.list_models(gan=True):
        raise checkpoint.CheckpointError(
            f"{saved.path} holds the GAN {chosen.model}, which has no accuracy; its metrics: python -m fastcifar.train "
            f"--resume {saved.path} --eval-only --classifier RUN"
        )


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
    chosen = Recipe(**{**loop.read_config(saved), "impl": parsed.impl, "device": parsed.device})
    _refuse_gan(chosen, saved)
    name = parsed.dataset or chosen.dataset
    dataset = data.load_dataset(name, parsed.data_dir or chosen.data_dir)
    for notice in dataset.notices:
        print(notice)
    model = classify.build_model(chosen, dataset)
    classify.load_weights(model, saved)
    model = model.to(device=device, memory_format=torch.channels_last)
    amp_dtype = environment.DTYPES[environment.choose_amp_dtype(parsed.amp_dtype, device)]
    settings = {"device": device, "amp_dtype": amp_dtype}
    measured = evaluation.evaluate_split(model, dataset, parsed.split, **settings)
    labels = getattr(dataset, f"{parsed.split}_labels")
    matrix = confusion.confusion_matrix(numpy.asarray(labels), measured.predictions.numpy(), dataset.num_classes)
    by_class = confusion.accuracy_by_class(matrix)
    print(confusion.table(by_class, dataset.class_names, matrix))
    result = {
        "checkpoint": str(saved.path),
        "step": saved.step,
        "model": chosen.model,
        "dataset": dataset.name,
        "synthetic": dataset.synthetic,
        "split": parsed.split,
        "images": len(labels),
        "accuracy": round(measured.accuracy, 4),
        "loss": round(measured.loss, 6),
    }
    if parsed.tta:
        views = evaluation.evaluate_split(model, dataset, parsed.split, tta=True, **settings)
        result["accuracy_tta"] = round(views.accuracy, 4)
    output = pathlib.Path(parsed.output) if parsed.output else checkpoint.run_folder(saved.path)
    output.mkdir(parents=True, exist_ok=True)
    title = f"{chosen.model}, step {saved.step}, {dataset.name} {parsed.split}: {measured.accuracy:.2f} %"
    picture = output / "confusion.png"
    missing = confusion.draw(matrix, dataset.class_names, picture, title)
    print(missing or f"confusion matrix: {picture}")
    classes = {name: round(value, 4) for name, value in zip(dataset.class_names, by_class, strict=True)}
    report = json.dumps({**result, "accuracy_by_class": classes, "confusion": matrix.tolist()})
    (output / "evaluation.json").write_text(report + "\n")
    print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    command_line.run("python -m fastcifar.evaluate", main)
