"""`python -m fastcifar.export`: a trained network as an ONNX file or a torch.export program, checked before done."""

from __future__ import annotations

import argparse
import hashlib
import json
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from fastcifar import command_line, models, validation
from fastcifar.deploy import programs
from fastcifar.training import checkpoint, recipe, run_folder, sampling, trained
from fastcifar.training.gan import load_gan

_CHECKED = 1000


def _parser() -> command_line.Parser:
    parser = command_line.Parser(
        prog="python -m fastcifar.export",
        description="Writes a classifier, or a GAN's generator, as a program for other runtimes, batch norm folded "
        "into the convolutions, and checks it against the network. The last line printed is one JSON object.",
    )
    parser.add_argument("--checkpoint", required=True, metavar="PATH", help="a checkpoint or a run folder")
    parser.add_argument("--format", default="onnx", help="onnx, or torch (for torch.export.load)")
    parser.add_argument("--output", metavar="FILE", help="default: MODEL.onnx or MODEL.pt2 in the run folder")
    parser.add_argument("--dataset", help="of the images to check with; default: that of the run")
    parser.add_argument("--data-dir", metavar="DIR", help="folder of the CIFAR archives or folders")
    return parser


class _Job(NamedTuple):
    """What is written: the network, all inputs to check with by name, the output's name, and notes for the JSON."""

    model: nn.Module
    inputs: dict[str, torch.Tensor]
    output: str
    notes: dict[str, Any]


def _classifier(parsed: argparse.Namespace, saved: checkpoint.Checkpoint) -> _Job:
    model, _, dataset, _ = trained.load_classifier(saved.path, parsed.dataset, parsed.data_dir)
    images = torch.from_numpy(dataset.test_images[:_CHECKED]).permute(0, 3, 1, 2).float() / 255
    notes = {
        "input": "images float32 [N, 3, H, W] in [0, 1]; the normalisation is part of the program",
        "output": "logits float32 [N, classes]",
        "checked_on": f"{dataset.name} test",
        "class_names": dataset.class_names,
    }
    return _Job(programs.Pixels(model, dataset), {"images": images}, "logits", notes)


def _generator(saved: checkpoint.Checkpoint) -> _Job:
    gan, names = load_gan(saved, recipe.of_checkpoint(saved, impl="auto", device="auto"))
    drawn = sampling.draw(gan, 0, 0, _CHECKED)
    inputs = {"z": drawn.latents} | ({"labels": drawn.labels} if gan.conditional else {})
    notes = {
        "input": f"z float32 [N, {gan.latent_dim}] from the normal distribution"
        + (", labels int64 [N]" if gan.conditional else ""),
        "output": "images float32 [N, 3, 32, 32] in [-1, 1]",
        "checked_on": "latents drawn from seed 0",
        "class_names": names if gan.conditional else None,
    }
    return _Job(gan.generator, inputs, "images", notes)


def _write(path: pathlib.Path, kind: str, job: _Job, *, classes: bool) -> tuple[dict[str, Any], bytes]:
    """The program's check and bytes; it gets its name only when it computes what the network does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        draft = pathlib.Path(folder) / path.name
        programs.write(draft, kind, job.model, {n: x[:2].clone() for n, x in job.inputs.items()}, job.output)
        check = programs.compare(programs.read(draft, kind), job.model, list(job.inputs.values()), classes=classes)
        content = draft.read_bytes()
        draft.replace(path)
    return check, content


def main(arguments: Sequence[str]) -> int:
    """Exports as the arguments say; returns the exit status.

    Raises:
        ValueError, OSError: a mistake of the user, or a program that does not compute what the network does.
    """
    parsed = _parser().parse_args(arguments)
    kind = validation.choose("--format", parsed.format, programs.FORMATS)
    if kind == "onnx":
        validation.require("export", "onnx", "onnxscript", "onnxruntime")
    saved = checkpoint.find(parsed.checkpoint, notify=print)
    name = recipe.of_checkpoint(saved, impl="auto", device="auto").model
    gan = name in models.list_models(gan=True)
    job = _generator(saved) if gan else _classifier(parsed, saved)
    path = pathlib.Path(parsed.output or checkpoint.run_folder(saved.path) / f"{name}{programs.FORMATS[kind]}")
    check, content = _write(path, kind, job, classes=not gan)
    result = {
        "checkpoint": str(saved.path), "step": saved.step, "model": name, "format": kind, "file": path.name,
        "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(), **job.notes, "check": check,
        "versions": programs.versions("torch", "onnx", "onnxscript", "onnxruntime"),
    }  # fmt: skip
    run_folder.write_json(path.with_name(f"{path.name}.json"), result)
    predictions = "" if gan else f", {check['equal_predictions']} predictions equal"
    print(
        f"{path}: {len(content):,} bytes; {check['inputs']} inputs: largest difference "
        f"{check['max_abs_difference']:.2g} of {check['largest_output']:.3g}{predictions}"
    )
    print(json.dumps({key: value for key, value in result.items() if key != "class_names"}), flush=True)
    return 0


if __name__ == "__main__":
    command_line.run("python -m fastcifar.export", main)
