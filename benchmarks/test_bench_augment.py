"""A batch of 512 augmented CIFAR images out of the resident set: ours beside plain PyTorch and a copy of as many bytes.

The bytes are those of the images and of the batch; what is drawn costs none. Nothing is timed that is not as near to
float64 as plain PyTorch is.
"""

import functools

import pytest
import torch

from benchmarks import reporting
from fastcifar import functional, native

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IMPL = "triton" if DEVICE.type == "cuda" else "native"
COUNT, BATCH, SIZE, DTYPE, ROUNDS = 50_000, 512, 32, torch.bfloat16, 60
DRAWS = {"seed": 0, "mean": (0.5071, 0.4865, 0.4409), "std": (0.2673, 0.2564, 0.2762)}
FAST = {"crop_pad": 4, "flips": True}
RECIPES = {
    "seed: zero crop, random flip, jitter": {
        "crop_pad": 4, "crop_mode": "zero", "random_flip": True, "color_jitter": 0.1,
    },
    "fast: reflect crop, alternating flip": FAST,
    "fast + cutout": {**FAST, "cutout": 8},
    "fast + mixup": {**FAST, "mixup": 1.0},
    "fast + cutmix": {**FAST, "cutmix": 1.0},
}  # fmt: skip
# At least as many times faster than plain PyTorch.
GOAL = 5.0


@pytest.fixture(scope="module")
def inputs():
    """The set, and indices and flips of a batch."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (COUNT, SIZE, SIZE, 3), generator=generator, dtype=torch.uint8)
    indices, flips = torch.randperm(COUNT, generator=generator)[:BATCH], torch.rand(BATCH, generator=generator) < 0.5
    return images.to(DEVICE), indices.to(DEVICE), flips.to(DEVICE)


def agrees(run):
    """Whether ours is as near to float64 as the reference in the same dtype, within a factor of three."""
    exact, low, got = (
        run("reference", dtype=torch.float64)[0], run("reference", dtype=DTYPE)[0], run(IMPL, dtype=DTYPE)[0]
    )  # fmt: skip
    error, allowed = (got.double() - exact).abs().max(), (low.double() - exact).abs().max()
    return error <= 3 * allowed + 4 * torch.finfo(DTYPE).eps * exact.abs().max()


@pytest.mark.benchmark(group="augmentation")
@pytest.mark.parametrize("recipe", RECIPES)
def test_augmentation(benchmark, add_row, inputs, recipe):
    native.tune_allocator()
    images, indices, flips = inputs
    step = torch.zeros(1, dtype=torch.int64, device=DEVICE)

    def run(impl, dtype=DTYPE):
        options = {**DRAWS, **RECIPES[recipe]}
        if options.get("flips"):
            options["flips"] = flips
        return functional.augment(images, indices, step=step, dtype=dtype, impl=impl, **options)

    assert agrees(run), f"{IMPL} does not agree with float64; it is not timed"
    read = BATCH * SIZE * SIZE * 3
    source = torch.ones((read + read * DTYPE.itemsize) // 2, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    variants = {
        IMPL: functools.partial(run, IMPL),
        "plain PyTorch": functools.partial(run, "reference"),
        "copy": lambda: target.copy_(source),
    }
    seconds = reporting.interleaved(variants, rounds=ROUNDS)
    ratio = seconds["plain PyTorch"] / seconds[IMPL]
    add_row(
        "augment",
        recipe=recipe,
        **{f"{name}, ms": 1e3 * value for name, value in seconds.items()},
        **{"images/s": BATCH / seconds[IMPL], "times PyTorch": ratio},
        **{"GB/s": 2 * len(source) / seconds[IMPL] / 1e9, "% of copy rate": 100 * seconds["copy"] / seconds[IMPL]},
    )
    benchmark.pedantic(variants[IMPL], rounds=5)
    assert ratio >= GOAL
