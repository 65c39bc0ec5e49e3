"""`python -m benchmarks.first_steps --preset NAME --steps N`: a preset cut to a few steps, where all of it needs hours.

Says whether it learns, how much memory a step needs and how long the whole preset would take here. Writes
results/first-steps-MODEL-PRESET.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from typing import Any

import torch

from benchmarks import reporting
from fastcifar import data, models
from fastcifar.training import distributed, environment, recipe, transfer
from fastcifar.training.classify import Classification
from fastcifar.training.options import Recipe


def _whole(flags: dict[str, Any], batch_size: int, images: int) -> Recipe:
    """The preset uncut, with this batch size and as many images in all."""
    kept = {key: value for key, value in flags.items() if key not in ("steps", "batch_size")}
    preset = recipe.resolve(kept, has_gpu=False)
    steps = None if preset.steps is None else max(1, preset.steps * preset.batch_size // batch_size)
    return recipe.with_budget(dataclasses.replace(preset, batch_size=batch_size, steps=steps), images)


def _seconds(times: list[float], chosen: Recipe) -> dict[bool, float]:
    """Median seconds of the steps that train all (False) and of those that train the head alone (True)."""
    parts = transfer.phases(chosen.phases, chosen.steps)
    kinds = [transfer.phase_at(parts, step).frozen for step in range(len(times))]
    found: dict[bool, float] = {}
    for kind in sorted(set(kinds)):
        own = [seconds for seconds, frozen in zip(times, kinds, strict=True) if frozen == kind]
        found[kind] = statistics.median(own[1:] or own)
    return found


def measure(flags: dict[str, Any], device: torch.device, test_images: int) -> dict[str, Any]:
    """Trains with these options and describes what happened."""
    chosen = recipe.resolve(flags, has_gpu=device.type == "cuda")
    dataset = data.load_dataset(chosen.dataset, chosen.data_dir)
    whole = _whole(flags, chosen.batch_size, len(dataset.train_images))
    chosen = recipe.with_budget(chosen, len(dataset.train_images))
    few = slice(max(test_images, 1))
    fewer = dataclasses.replace(dataset, test_images=dataset.test_images[few], test_labels=dataset.test_labels[few])
    task = Classification(chosen, fewer, device, distributed.Processes())
    transfer.first_weights(chosen, None)(task)
    times, averages = [], []
    for step in range(chosen.steps):
        started = time.perf_counter()
        task.train_step(step)
        averages.append(task.take_averages())  # waits for the step
        times.append(time.perf_counter() - started)
        print(f"step {step + 1}/{chosen.steps} · loss {averages[-1]['train_loss']:.4f} · {times[-1]:.2f} s", flush=True)
    memory = environment.memory_mib(device)
    quarter = max(1, chosen.steps // 4)
    by_kind = _seconds(times, chosen)
    seconds = sum(
        (phase.stop - phase.start) * by_kind.get(phase.frozen, by_kind[min(by_kind)])
        for phase in transfer.phases(whole.phases, whole.steps)
    )
    row = {
        "model": chosen.model, "preset": chosen.preset, "data set": dataset.name,
        "parameters": models.count_parameters(task.model), "steps": chosen.steps, "batch": chosen.batch_size,
        "loss, first quarter": statistics.mean(a["train_loss"] for a in averages[:quarter]),
        "loss, last quarter": statistics.mean(a["train_loss"] for a in averages[-quarter:]),
        "train accuracy, last quarter, %": statistics.mean(a["train_accuracy"] for a in averages[-quarter:]),
        "seconds a step": by_kind[min(by_kind)], "peak MiB": memory, "whole preset, steps": whole.steps,
        "whole preset, hours here": seconds / 3600,
    }  # fmt: skip
    if chosen.phases:
        row |= {"phases": chosen.phases, "backbone": chosen.backbone or "none"}
        row |= {"seconds a step of the head alone": by_kind[True]} if True in by_kind else {}
    if test_images:
        row |= {"test images": len(fewer.test_images), "test accuracy, %": task.evaluate("test").accuracy}
    if test_images and chosen.tta:
        row["with TTA, %"] = task.evaluate("test", tta=True).accuracy
    return row


def main() -> None:
    """Trains, prints, writes the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_steps", description=__doc__.split("\n\n")[0])
    parser.add_argument("--preset", required=True)
    parser.add_argument("--model")
    parser.add_argument("--dataset", help="default: the preset's, else cifar100")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("-b", "--batch-size", type=int, help="default: the preset's")
    parser.add_argument("--backbone", help="first weights of the backbone; none for random ones")
    parser.add_argument("--test-images", type=int, default=0, help="evaluate on so many of them")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    flags = {key: value for key, value in vars(options).items() if value is not None and key != "test_images"}
    flags.setdefault("dataset", recipe.PRESETS[options.preset].get("dataset", "cifar100"))
    device = environment.choose_device(options.device)
    environment.prepare_process(device, deterministic=False)
    row = measure(flags, device, options.test_images)
    print(reporting.table([{"what": name, "value": value} for name, value in row.items()]))
    print(reporting.save(f"first-steps-{row['model']}-{row['preset']}", {"rows": [row]}))


if __name__ == "__main__":
    main()
