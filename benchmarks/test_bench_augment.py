"""A batch of augmented CIFAR images out of the resident set: ours beside plain PyTorch and a copy of as many bytes.

The bytes are those of the images, read, and of the batch, written; draws move none.
"""

import functools

import pytest
import torch

from benchmarks import agreement, timing
from benchmarks.timing import DEVICE
from fastcifar import functional

DTYPE, SIZE = torch.bfloat16, 32
DRAWS = {"seed": 0, "mean": (0.5071, 0.4865, 0.4409), "std": (0.2673, 0.2564, 0.2762)}
FAST = {"crop_pad": 4, "flips": True}
RECIPES = {
    "zero crop, random flip, jitter": {
        "crop_pad": 4, "crop_mode": "zero", "random_flip": True, "color_jitter": 0.1,
    },
    "reflect crop, alternating flip": FAST,
    "reflect crop, alternating flip, cutout": {**FAST, "cutout": 8},
    "reflect crop, alternating flip, mixup": {**FAST, "mixup": 1.0},
    "reflect crop, alternating flip, cutmix": {**FAST, "cutmix": 1.0},
}  # fmt: skip
# Operations a value: the normalisation's two; brightness, contrast, grey, saturation; the share of a partner.
OPERATIONS = {"color_jitter": 20, "mixup": 5}


@pytest.fixture(scope="module")
def images():
    """As many as CIFAR's training set holds."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (50_000, SIZE, SIZE, 3), generator=generator, dtype=torch.uint8).to(DEVICE)


@pytest.mark.benchmark(group="augmentation, bfloat16", timer=timing.replayed)
@pytest.mark.parametrize("recipe", RECIPES)
def test_augmentation(keep, smoke, effort, request, images, recipe):
    batch, options = 8 if smoke else 512, {**DRAWS, **RECIPES[recipe]}
    generator = torch.Generator().manual_seed(1)
    indices = torch.randperm(len(images), generator=generator)[:batch].to(DEVICE)
    if options.get("flips"):
        options["flips"] = (torch.rand(batch, generator=generator) < 0.5).to(DEVICE)
    # On the device, as a captured step has it.
    step = torch.zeros(1, dtype=torch.int64, device=DEVICE)

    def made(impl, dtype=DTYPE):
        return functional.augment(images, indices, step=step, dtype=dtype, impl=impl, **options)[:1]

    cases = {"ours": functools.partial(made, "auto"), "eager": functools.partial(made, "reference")}
    if not smoke and (DEVICE.type == "cuda" or request.config.getoption("--compile")):
        cases["torch.compile"] = torch.compile(cases["eager"])
    exact = made("reference", torch.float64)
    refused = agreement.refused(cases, exact, eager="eager", ours="ours", eps=torch.finfo(DTYPE).eps)
    values = batch * SIZE * SIZE * 3
    moved = values + values * DTYPE.itemsize
    source = torch.ones(moved // 2, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    calls = {name: call for name, call in cases.items() if name not in refused} | {"copy": lambda: target.copy_(source)}
    operations = values * (2 + sum(count for name, count in OPERATIONS.items() if options.get(name)))
    rows, rounds = timing.measure(
        calls, {"batch": batch, "augmentations": recipe}, refused, copied=moved,
        moved=dict.fromkeys(("whole", "both"), moved), operations=dict.fromkeys(("whole", "both"), operations),
        **(effort if smoke else effort | {"rounds": 60}),
    )  # fmt: skip
    keep("augment", [row for row in rows if row.get("phase") != "whole"], rounds)
