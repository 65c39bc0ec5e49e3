"""The Triton kernel of the augmentations, in the interpreter."""

import pytest
import torch
from augment_case import CASES, DRAWS, hold, hold_to_the_oracle, inputs_of, opcheck_arguments, run, same
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcifar import functional

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="with a GPU the kernel is tested on it, see test_augment_gpu.py"
)
OPTIONS = pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
# The reference itself rounds twice on a processor without fused multiply-adds.
FUSED = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


@OPTIONS
def test_equals_the_reference(options):
    hold("triton", options, exact=FUSED, count=6)


@pytest.mark.parametrize("name", ["strong jitter", "mixup, all", "cutmix, all"])
def test_half_precision(name):
    hold("triton", CASES[name], torch.float16, exact=FUSED, count=4)


@pytest.mark.parametrize("name", ["strong jitter", "mixup, all", "cutmix, all"])
def test_equals_the_oracle(name):
    hold_to_the_oracle("triton", CASES[name])


@pytest.mark.parametrize("size", [(1, 1), (5, 64), (33, 17), (32, 32), (3, 100)], ids=str)
def test_sizes(size):
    """The last is wider than a tile, which ends within a pixel."""
    for name in ("given flips",) if size == (1, 1) else ("zero", "cutmix, all"):
        hold("triton", {**CASES[name], "crop_pad": min(1, min(size) - 1)}, size=size, exact=FUSED, count=3)


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(
    height=st.integers(1, 14), width=st.integers(1, 14), pad=st.integers(0, 9), reflect=st.booleans(),
    flip=st.sampled_from(["off", "random", "given"]), jitter=st.sampled_from([0.0, 0.1, 1.0]),
    cutout=st.integers(0, 12), mixing=st.sampled_from([{}, {"mixup": 0.2}, {"cutmix": 1.0}]),
    step=st.integers(0, 2**63 - 1), seed=st.integers(0, 2**63 - 1),
)  # fmt: skip
def test_any_options(height, width, pad, reflect, flip, jitter, cutout, mixing, step, seed):
    options = {
        "crop_pad": min(pad, height - 1, width - 1) if reflect else pad, "crop_mode": "reflect" if reflect else "zero",
        "color_jitter": jitter, "cutout": cutout, **mixing,
    }  # fmt: skip
    options |= {"random_flip": True} if flip == "random" else {"flips": True} if flip == "given" else {}
    hold("triton", options, size=(height, width), exact=FUSED, step=step, seed=seed, count=3)


@pytest.mark.parametrize("name", ["given flips", "mixup, all", "cutmix, all"])
def test_a_step_on_the_device_and_parts_of_the_batch_change_nothing(name):
    whole = run("triton", CASES[name], count=5)
    assert same(whole, run("triton", CASES[name], count=5, step=torch.tensor([3])))
    parts = [run("triton", CASES[name], first=first, count=count) for first, count in ((0, 2), (2, 0), (2, 3))]
    for field, value in enumerate(whole):
        if value is not None:
            assert torch.equal(torch.cat([part[field] for part in parts]), value)


def test_several_programs_make_the_same_image(monkeypatch):
    several = run("triton", CASES["mixup, all"], (32, 32), count=2)
    monkeypatch.setattr("fastcifar.kernels.triton.augment_launch.PROGRAMS", 1)
    assert same(several, run("triton", CASES["mixup, all"], (32, 32), count=2))


@pytest.mark.parametrize("index", [-1, 37, 2**62])
def test_an_index_out_of_range_reads_nothing(index):
    images, indices, _ = inputs_of(9, 8)
    indices = indices.clone()
    indices[4] = index
    for options in ({}, {"color_jitter": 0.5, "crop_pad": 2}):
        made = functional.augment(images, indices, step=0, impl="triton", **options, **DRAWS)[0]
        assert made[4].isnan().all() and not made[:4].isnan().any() and not made[5:].isnan().any()


def test_every_element_is_written():
    """torch.empty holds NaN here: what the kernel leaves out would show."""
    torch.use_deterministic_algorithms(True)
    try:
        results = [run("triton", CASES["cutmix, all"], size=(13, 11), count=3) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.isfinite(results[0][0]).all() and same(*results)


@pytest.mark.parametrize("name", ["plain", "given flips", "mixup, all", "cutmix"])
def test_opcheck(name):
    from fastcifar.ops import augment  # noqa: F401  (registers the operator)

    arguments = opcheck_arguments(CASES[name], impl="triton", count=2)
    torch.library.opcheck(torch.ops.fastcifar.augment.default, arguments)


def test_compiles_as_one_graph():
    images, indices, flips = inputs_of(9, 8)
    options = {**CASES["cutmix, all"], **DRAWS, "flips": flips, "count": 2}

    def mean_of(indices, step):
        made, partners, _ = functional.augment(images, indices, step=step, impl="triton", **options)
        return made.mean((1, 2, 3)) * 2 + partners

    compiled = torch.compile(mean_of, fullgraph=True, backend="aot_eager")
    for step in (0, 1, 7, torch.tensor([5])):
        assert torch.equal(compiled(indices, step), mean_of(indices, step))
