"""The augmentations on a GPU: numbers, determinism, CUDA graphs."""

import itertools

import numpy
import pytest
import torch
from augment_case import CASES, DRAWS, DTYPES, hold, hold_to_the_oracle, inputs_of, run, same

from fastcifar import functional
from fastcifar.data import Augmentation, ResidentLoader

pytestmark = pytest.mark.gpu
OPTIONS = pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
SIZES = [(9, 8), (33, 17), (32, 32), (64, 200)]
# Every combination is another compilation: each option has one of the sizes and dtypes, each of those pairs an option.
DIAGONAL = list(zip(CASES, itertools.cycle(SIZES), itertools.cycle(DTYPES), strict=False))


@pytest.mark.parametrize(("name", "size", "dtype"), DIAGONAL, ids=str)
def test_numbers(name, size, dtype):
    """CUDA contracts a·b + c in float64 and divides by multiplying: the last bits are not the reference's."""
    options = CASES[name]
    found, expected = (run(impl, options, size, "cuda") for impl in ("triton", "reference"))
    if found[1] is not None:
        assert torch.equal(found[1], expected[1])
        torch.testing.assert_close(found[2], expected[2], rtol=3e-7, atol=0)
    hold("triton", options, DTYPES[dtype], size, "cuda", exact=False)


@pytest.mark.parametrize(("name", "dtype"), [("mixup, all", "bf16"), ("cutmix, all", "fp32")], ids=["mixup", "cutmix"])
def test_memcheck(name, dtype):
    assert run("triton", CASES[name], (33, 17), "cuda", dtype=DTYPES[dtype])[0].cpu().isfinite().all()


@OPTIONS
def test_equals_the_oracle(options):
    hold_to_the_oracle("triton", options, device="cuda")


@OPTIONS
def test_equals_the_compiled_core_or_the_reference_of_the_cpu(options):
    """Geometry and draws to the bit: without arithmetic on colours nothing may differ."""
    found, expected = (run("auto", options, device=device)[0].cpu() for device in ("cuda", "cpu"))
    if not (options.get("color_jitter") or options.get("mixup")):
        assert torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=0, atol=4e-6)


def test_runs_and_parts_are_equal_to_the_bit():
    options = CASES["mixup, all"]
    whole = run("triton", options, (32, 32), "cuda")
    for _ in range(5):
        assert same(whole, run("triton", options, (32, 32), "cuda"))
    parts = [run("triton", options, (32, 32), "cuda", first=first, count=count) for first, count in ((0, 5), (5, 7))]
    assert torch.equal(torch.cat([part[0] for part in parts]), whole[0])


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("mixing", [{}, {"mixup": 0.5}, {"cutmix": 1.0}], ids=["none", "mixup", "cutmix"])
def test_a_captured_loader_advances_on_the_device(mixing, impl):
    images, labels = inputs_of(32, 32)[0].numpy(), numpy.arange(37) % 10
    augmentation = Augmentation(crop_pad=4, hflip="alternating", color_jitter=0.1, cutout=8, **mixing)
    loader = ResidentLoader(
        images, labels, batch_size=12, num_classes=10, augmentation=augmentation, device="cuda", impl=impl, **DRAWS
    )
    first = loader.plan(0)
    static = first._replace(step=first.step.cuda(), indices=first.indices.cuda(), flips=first.flips.cuda())
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        loader.render(static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        batch = loader.render(static)
        static.step.add_(1)
    for number in range(4):
        planned = loader.plan(number)
        static.indices.copy_(planned.indices)
        static.flips.copy_(planned.flips)
        graph.replay()
        assert same(batch, loader.batch(number))


def test_an_index_out_of_range_reads_nothing():
    images, indices, _ = (tensor.cuda() for tensor in inputs_of(32, 32))
    indices = indices.clone()
    indices[4] = 2**62
    made = functional.augment(images, indices, step=0, impl="triton", color_jitter=0.5, **DRAWS)[0]
    assert made[4].isnan().all() and made.isnan().sum() == made[4].numel()
