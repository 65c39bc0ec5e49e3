"""Many steps leave memory, objects, threads and files as they were; nothing is compiled after the warm-up."""

import gc
import os
import threading

import pytest
import torch
from training_case import write_tiny

from fastcifar import data
from fastcifar.training import distributed, loop, progress, recipe, run_folder
from fastcifar.training.adversarial import Adversarial
from fastcifar.training.classify import Classification

COMMON = {"amp_dtype": "fp32", "batch_size": 2, "model_ema_decay": 0.9, "eval_every": 50, "save_every": 50}
PLAIN = {"model": "small_filters_cnn", "model_options": {"widths": (1, 1, 1)}, "crop_pad": 1, "hflip": "random"}
KINDS = {
    "small_filters_cnn": (Classification, PLAIN, 2_000),
    "ds_resnet": (Classification, {"model_options": {"width": 0.02}}, 400),
    "dcgan": (Adversarial, {"model": "dcgan", "model_options": {"width": 1, "latent_dim": 2}}, 400),
}


def make(name, folder, **more):
    kind, options, _ = KINDS[name]
    dataset = data.load_dataset(write_tiny(folder / "tiny.npz", size=32, classes=2))
    chosen = recipe.resolve({**COMMON, **options, **more}, has_gpu=False)
    chosen = recipe.with_budget(chosen, len(dataset.train_images))
    return kind(chosen, dataset, torch.device("cpu"), distributed.Processes())


def resident_mib():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def holdings():
    """What a leak would let grow: Python objects, tensors, threads, open files."""
    gc.collect()
    objects = gc.get_objects()
    tensors = sum(issubclass(type(thing), torch.Tensor) for thing in objects)
    files = len(os.listdir("/proc/self/fd"))
    return {"objects": len(objects), "tensors": tensors, "threads": threading.active_count(), "files": files}


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads /proc")
@pytest.mark.parametrize("name", KINDS)
def test_nothing_grows(name, tmp_path, record_property, monkeypatch, one_thread):
    steps = KINDS[name][2]
    running = make(name, tmp_path, steps=steps)
    folder = run_folder.RunFolder(tmp_path / "run", columns=run_folder.COLUMNS + run_folder.GAN_COLUMNS)
    seen = {}
    original = running.train_step

    def train_step(step):
        if step in (steps // 5, steps - 1):
            seen[step] = holdings(), resident_mib()
        original(step)

    monkeypatch.setattr(running, "train_step", train_step)
    loop.Loop(running, folder, progress.Silent(steps), distributed.Processes()).run()
    folder.close()
    (early, early_mib), (late, late_mib) = seen[steps // 5], seen[steps - 1]
    assert abs(late.pop("objects") - early.pop("objects")) < 100
    assert late == early
    assert late_mib - early_mib < 8
    record_property("steps", steps)
    record_property("MiB grown", round(late_mib - early_mib, 2))


def test_nothing_is_compiled_after_the_warm_up(tmp_path, monkeypatch, record_property, one_thread):
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: original(model, backend=backend))
    torch._dynamo.reset()
    running = make("ds_resnet", tmp_path, steps=60, compile=True)
    for step in range(3):
        running.train_step(step)
    warm = len(compiled)
    for step in range(3, 60):
        running.train_step(step)
    assert len(compiled) == warm > 0
    record_property("graphs", warm)
