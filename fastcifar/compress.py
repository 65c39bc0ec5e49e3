"""`python -m fastcifar.compress`: a trained classifier made smaller, and what that costs in accuracy."""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import json
import pathlib
import signal
from collections.abc import Sequence
from typing import Any

import numpy
from torch import nn

from fastcifar import command_line, data, models, validation
from fastcifar.deploy import measuring, programs, pruning, quantisation
from fastcifar.training import checkpoint, classify, distributed, environment, loop, run_folder, trained
from fastcifar.training.networks import moments
from fastcifar.training.options import Recipe
from fastcifar.training.progress import Lines

METHODS = ("channels", "unstructured", "int8")
_CALIBRATION = 1000
# What fine-tuning does not take over from the run.
_UNTUNED = (
    "epochs", "model_ema_decay", "resume", "init_weights", "backbone", "phases", "teacher", "kd_cache", "eval_only",
)  # fmt: skip


def _parser() -> command_line.Parser:
    parser = command_line.Parser(
        prog="python -m fastcifar.compress",
        description="Prunes or quantises a classifier and measures both in ONNX Runtime. The last line printed "
        "is the result, one JSON object.",
    )
    parser.add_argument("--checkpoint", required=True, metavar="PATH", help="a checkpoint or a run folder")
    parser.add_argument("--method", required=True, help="channels (a smaller network), unstructured (zeros) or int8")
    parser.add_argument("--amount", type=command_line.number, default=0.5, help="share that is pruned; default: 0.5")
    parser.add_argument("--fine-tune", type=command_line.whole_number, default=0, metavar="STEPS", help="after pruning")
    parser.add_argument("--lr", type=command_line.number, help="of fine-tuning; default: a quarter of the run's")
    parser.add_argument("--device", default="auto", help="of fine-tuning: auto, cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=command_line.whole_number, default=1, help="of the timings; default: 1")
    parser.add_argument("--dataset", help="default: the one that the checkpoint was trained on")
    parser.add_argument("--data-dir", metavar="DIR", help="folder of the CIFAR archives or folders")
    parser.add_argument(
        "--output", metavar="DIR", help="run folder of the new network; default: METHOD in the run folder"
    )
    return parser


def _check(parsed: argparse.Namespace) -> None:
    validation.choose("--method", parsed.method, METHODS)
    validation.require("compress", "onnx", "onnxscript", "onnxruntime")
    if not 0 < parsed.amount < 1:
        raise ValueError(f"--amount must lie between 0 and 1, got {parsed.amount:g}")
    if parsed.fine_tune < 0 or parsed.threads < 1:
        raise ValueError(f"--fine-tune must be ≥ 0 and --threads ≥ 1, got {parsed.fine_tune} and {parsed.threads}")
    if parsed.fine_tune and parsed.method == "int8":
        raise ValueError("--fine-tune is for pruning: 8-bit networks are made of trained ones")


def _recipe(parsed: argparse.Namespace, recipe: Recipe, options: dict[str, Any], output: pathlib.Path) -> Recipe:
    """That of fine-tuning, by which the new network is found again."""
    changed = {name: getattr(Recipe(), name) for name in _UNTUNED}
    return dataclasses.replace(
        recipe, **changed, model_options={**recipe.model_options, **options}, steps=parsed.fine_tune or 1,
        lr=recipe.lr / 4 if parsed.lr is None else parsed.lr, sched="linear", warmup_steps=0, eval_every=0,
        output=str(output), device=parsed.device,
    )  # fmt: skip


def _prune(
    parsed: argparse.Namespace, source: trained.Trained, output: pathlib.Path
) -> tuple[dict[str, Any], nn.Module]:
    """Writes the pruned network, and the fine-tuned one; their files by name, and the last of them."""
    options: dict[str, Any] = {}
    if parsed.method == "channels":
        kept = pruning.kept_channels(source.model, parsed.amount)
        options, state = {"inner_widths": [len(indices) for indices in kept]}, pruning.pruned_state(source.model, kept)
        print(f"inner channels of the blocks: {', '.join(str(len(indices)) for indices in kept)}")
    else:
        sparse = copy.deepcopy(source.model)
        pruning.zero_weights(sparse, parsed.amount)
        state = sparse.state_dict()
    recipe = _recipe(parsed, source.recipe, options, output)
    device = environment.choose_device(parsed.device)
    # Trained on further are the images that the run was trained on; measured is on the test images.
    own = parsed.fine_tune and parsed.dataset is None
    dataset = data.hold_out(source.dataset, recipe.holdout) if own else source.dataset
    task = classify.Classification(recipe, dataset, device, distributed.Processes())
    task.model.load_state_dict(state)
    task.restart_average()
    name = f"{parsed.method} {100 * parsed.amount:g} %"
    networks = {name: _write(task.model, source.dataset, output / "pruned.onnx")}
    if parsed.fine_tune:
        with pruning.zeros_held(task.model) if parsed.method == "unstructured" else contextlib.nullcontext():
            _fine_tune(task)
        networks[f"{name}, {parsed.fine_tune} steps"] = _write(task.model, source.dataset, output / "tuned.onnx")
    tensors = {f"model.{key}": tensor for key, tensor in task.model.state_dict().items()}
    config = {"config": dataclasses.asdict(recipe), "seconds": 0.0, "since": [0, 0.0]}
    config |= moments(source.dataset)
    checkpoint.save(output / "checkpoints", source.saved.step + parsed.fine_tune, tensors, config)
    return networks, task.model.cpu()


def _fine_tune(task: classify.Classification) -> None:
    """Trains the network on, in place."""
    progress = Lines(task.recipe.steps, lambda line: None)
    try:
        loop.Loop(task, None, progress, distributed.Processes()).run()
    except loop.NotFinite as error:
        raise ValueError(f"fine-tuning diverged; lower --lr {task.recipe.lr:g}") from error
    except loop.OutOfMemory as error:
        raise MemoryError(str(error)) from error


def _write(model: nn.Module, dataset: data.ImageDataset, path: pathlib.Path) -> pathlib.Path:
    """The network as a checked ONNX file."""
    images = measuring.pixels(dataset.test_images[:100])
    network = programs.Pixels(copy.deepcopy(model).cpu(), dataset)
    programs.write(path, "onnx", network, {"images": images[:2].clone()}, "logits")
    programs.compare(programs.read(path, "onnx", 1), network, [images], classes=True)
    return path


def main(arguments: Sequence[str]) -> int:
    """Compresses as the arguments say; returns the exit status.

    Raises:
        ValueError, OSError: a mistake of the user; the message says what to do.
    """
    parsed = _parser().parse_args(arguments)
    _check(parsed)
    environment.prepare_process(environment.choose_device(parsed.device), deterministic=False)
    source = trained.load_classifier(parsed.checkpoint, parsed.dataset, parsed.data_dir)
    output = pathlib.Path(parsed.output or checkpoint.run_folder(source.saved.path) / parsed.method)
    if checkpoint.list_checkpoints(output / "checkpoints"):
        raise ValueError(f"--output {output} already holds a run; choose another folder")
    output.mkdir(parents=True, exist_ok=True)
    files = {"original": _write(source.model, source.dataset, output / "original.onnx")}
    sizes = {"original": source.model}
    if parsed.method == "int8":
        chosen = numpy.random.default_rng(0).permutation(len(source.dataset.train_images))[:_CALIBRATION]
        images = measuring.pixels(source.dataset.train_images[chosen]).numpy()
        files["int8"] = output / "int8.onnx"
        quantisation.quantise(files["original"], files["int8"], images)
    else:
        try:
            networks, model = _prune(parsed, source, output)
        except loop.Stopped as stopped:
            return 128 + (stopped.signal or signal.SIGTERM)
        files |= networks
        sizes |= dict.fromkeys(networks, model)
    rows = measuring.compare(files, source.dataset, threads=parsed.threads)
    for row in rows:
        model = sizes.get(row["network"], source.model)
        row |= {"parameters": models.count_parameters(model), "nonzero": pruning.nonzero(model)}
    _show(rows)
    result = {
        "checkpoint": str(source.saved.path), "model": source.recipe.model, "dataset": source.dataset.name,
        "method": parsed.method, "amount": None if parsed.method == "int8" else parsed.amount,
        "fine_tune": parsed.fine_tune, "threads": parsed.threads, "images": 100, "rows": rows,
        "versions": programs.versions("torch", "onnx", "onnxruntime"), "processor": environment.processor_name(),
        "output": str(output),
    }  # fmt: skip
    run_folder.write_json(output / "compress.json", result)
    print(json.dumps({key: value for key, value in result.items() if key != "rows"}), flush=True)
    return 0


def _show(rows: Sequence[dict[str, Any]]) -> None:
    width = max(len(row["network"]) for row in rows)
    print(f"{'network':{width}}  parameters  not zero      bytes  compressed  accuracy  ms for 100 images")
    for row in rows:
        print(
            f"{row['network']:{width}}  {row['parameters']:10,}  {row['nonzero']:8,}  {row['bytes']:9,}  "
            f"{row['compressed']:10,}  {row['accuracy']:6.2f} %  {row['ms']:17.2f}"
        )


if __name__ == "__main__":
    command_line.run("python -m fastcifar.compress", main)
