"""The fused operators forward and backward, and a whole training step, beside eager PyTorch."""

import pytest
import torch

from benchmarks import operators, reporting, training_step
from fastcifar import models, native

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SUBJECTS = list(operators.subjects(torch.bfloat16, DEVICE))


@pytest.fixture(autouse=True)
def tuned():
    native.tune_allocator()


@pytest.mark.benchmark(group="operators, bfloat16")
@pytest.mark.parametrize("make", SUBJECTS, ids=lambda make: "-".join(map(str, make.args[0])))
def test_operator(benchmark, add_row, make):
    subject = make()
    add_row("operators", **operators.measure(subject, rounds=5, compiled=False))
    benchmark.pedantic(subject.step("auto"), rounds=3)


@pytest.mark.benchmark(group="training step, bfloat16")
@pytest.mark.parametrize("batch_size", [512 if DEVICE.type == "cuda" else 128])
def test_training_step(benchmark, add_row, batch_size):
    batch = training_step.synthetic_loader(batch_size, torch.bfloat16).batch(0)
    images = batch.images.float().to(DEVICE).contiguous(memory_format=torch.channels_last)
    labels = batch.labels.to(DEVICE)
    ours = training_step.step_of(models.create_model("ds_resnet"), images, labels, True)
    plain = training_step.step_of(training_step.plain_ds_resnet(), images, labels, True)
    seconds = reporting.interleaved({"ours": ours, "eager": plain}, rounds=5)
    add_row(
        "training step", **{"model": "ds_resnet", "batch": batch_size},
        **{f"{name}, ms": 1e3 * value for name, value in seconds.items()},
        **{"eager / ours": seconds["eager"] / seconds["ours"]},
    )  # fmt: skip
    benchmark.pedantic(ours, rounds=3)
