"""`python -m fastcifar.explain`: where a trained classifier looks, as a picture."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence

from fastcifar import command_line, data, validation
from fastcifar.deploy import explanation
from fastcifar.training import checkpoint, run_folder, trained


def _parser() -> command_line.Parser:
    parser = command_line.Parser(
        prog="python -m fastcifar.explain",
        description="Draws where a classifier looks. The last line printed is the result, one JSON object.",
    )
    parser.add_argument("--checkpoint", required=True, metavar="PATH", help="a checkpoint or a run folder")
    parser.add_argument("--images", default="0-15", metavar="NUMBERS", help="of the split, such as 0-15 or 3,14,15")
    parser.add_argument("--split", default="test", help="test or train")
    parser.add_argument("--layer", help="whose maps Grad-CAM weighs; default: the last that has maps")
    parser.add_argument("--dataset", help="default: the one that the checkpoint was trained on")
    parser.add_argument("--data-dir", metavar="DIR", help="folder of the CIFAR archives or folders")
    parser.add_argument("--output", metavar="FILE", help="default: explanation.png in the run folder")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Explains as the arguments say; returns the exit status.

    Raises:
        ValueError, OSError: a mistake of the user; the message says what to do.
    """
    parsed = _parser().parse_args(arguments)
    validation.require("explain", "captum")
    split = validation.choose("--split", parsed.split, ("test", "train"))
    chosen = command_line.numbers("--images", parsed.images)
    model, recipe, dataset, saved = trained.load_classifier(parsed.checkpoint, parsed.dataset, parsed.data_dir)
    images, labels = getattr(dataset, f"{split}_images"), getattr(dataset, f"{split}_labels")
    if max(chosen) >= len(images):
        raise ValueError(f"--images {max(chosen)}: {dataset.name} has {len(images)} {split} images, numbered from 0")
    images, labels = images[chosen], labels[chosen]
    batches = data.evaluation_batches(images, labels, batch_size=len(images), mean=dataset.mean, std=dataset.std)
    found = explanation.explain(model, next(batches)[0], parsed.layer)
    picture = pathlib.Path(parsed.output or checkpoint.run_folder(saved.path) / "explanation.png")
    explanation.draw(picture, found, images, labels, dataset.class_names)
    result = {
        "checkpoint": str(saved.path),
        "step": saved.step,
        "model": recipe.model,
        "dataset": dataset.name,
        "split": split,
        "layer": found.layer,
        "picture": str(picture),
        "largest_incompleteness": round(found.incompleteness.max().item(), 4),
        "images": [
            {
                "number": number,
                "true": dataset.class_names[label],
                "predicted": dataset.class_names[predicted],
                "probability": round(probability, 4),
            }
            for number, label, predicted, probability in zip(
                chosen, labels, found.predicted.tolist(), found.probability.tolist(), strict=True
            )
        ],
    }
    run_folder.write_json(picture.with_suffix(".json"), result)
    print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    command_line.run("python -m fastcifar.explain", main)
