"""The augmentations on the compiled CPU core, with every instruction set it has."""

import functools

import pytest
import torch
from augment_case import CASES, DRAWS, DTYPES, hold, hold_to_the_oracle, inputs_of, opcheck_arguments, run, same
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcifar import functional, native

pytestmark = pytest.mark.skipif(native.module() is None, reason=f"no compiled module: {native.why_not()}")
OPTIONS = pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
LEVELS = native.module().isa_levels() if native.module() else ["none"]
# Without fused multiply-adds a normalised value may differ from the reference's in its last bit.
FUSED = "avx2" in LEVELS


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@OPTIONS
def test_equals_the_reference(options, dtype):
    hold("native", options, dtype, exact=FUSED)


@OPTIONS
def test_equals_the_oracle(options):
    hold_to_the_oracle("native", options)


@pytest.mark.parametrize("size", [(4, 4), (5, 64), (33, 17), (32, 32), (50, 31)], ids=str)
def test_sizes(size):
    for name in ("reflect", "zero", "cutmix, all", "mixup, all"):
        hold("native", CASES[name], size=size, exact=FUSED)
    hold("native", {"flips": True, "color_jitter": 0.2}, torch.bfloat16, size=(1, 1), exact=FUSED)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    height=st.integers(1, 40), width=st.integers(1, 40), pad=st.integers(0, 12), reflect=st.booleans(),
    flip=st.sampled_from(["off", "random", "given"]), jitter=st.sampled_from([0.0, 0.1, 1.0]),
    cutout=st.integers(0, 12), mixing=st.sampled_from([{}, {"mixup": 0.2}, {"cutmix": 1.0}]),
    dtype=st.sampled_from([*DTYPES.values()]), step=st.integers(0, 2**63 - 1), seed=st.integers(0, 2**63 - 1),
)  # fmt: skip
def test_any_options(height, width, pad, reflect, flip, jitter, cutout, mixing, dtype, step, seed):
    options = {
        "crop_pad": min(pad, height - 1, width - 1) if reflect else pad, "crop_mode": "reflect" if reflect else "zero",
        "color_jitter": jitter, "cutout": cutout, **mixing,
    }  # fmt: skip
    options |= {"random_flip": True} if flip == "random" else {"flips": True} if flip == "given" else {}
    hold("native", options, dtype, size=(height, width), exact=FUSED, step=step, seed=seed)


@pytest.fixture
def level(request):
    before = native.module().isa()
    native.module().set_isa(request.param)
    yield request.param
    native.module().set_isa(before)


@pytest.mark.parametrize("level", LEVELS, indirect=True)
@OPTIONS
def test_each_instruction_set(level, options):
    for dtype in DTYPES.values():
        hold("native", options, dtype, size=(11, 23), exact=level != "baseline")


def test_the_same_for_any_number_of_threads():
    images, indices, _ = inputs_of(32, 32, batch=64)
    call = functools.partial(functional.augment, images, indices, step=1, impl="native", **DRAWS)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(call(color_jitter=0.3, crop_pad=4, cutmix=1.0, cutout=8, random_flip=True))
    finally:
        torch.set_num_threads(before)
    assert same(results[0], results[1]) and same(results[0], results[2])


@OPTIONS
def test_a_step_on_the_device_and_parts_of_the_batch_change_nothing(options):
    whole = run("native", options)
    assert same(whole, run("native", options, step=torch.tensor([3])))
    parts = [run("native", options, first=first, count=count) for first, count in ((0, 5), (5, 0), (5, 7))]
    for field, value in enumerate(whole):
        if value is not None:
            assert torch.equal(torch.cat([part[field] for part in parts]), value)


@pytest.mark.parametrize("index", [-1, 37, 2**62])
def test_an_index_out_of_range_is_named(index):
    images, indices, _ = inputs_of(9, 8)
    indices = indices.clone()
    indices[4] = index
    with pytest.raises(IndexError, match=f"index {index} at position 4 is not within the 37 images"):
        functional.augment(images, indices, step=0, impl="native", **DRAWS)


def test_strided_indices_and_flips():
    images, indices, flips = inputs_of(9, 8)
    call = functools.partial(functional.augment, images, step=0, impl="native", **DRAWS)
    found = call(indices[::2], flips=flips[::2])
    assert same(found, call(indices[::2].clone(), flips=flips[::2].clone()))


@pytest.mark.parametrize("name", ["plain", "given flips", "mixup, all", "cutmix"])
def test_opcheck(name):
    from fastcifar.ops import augment  # noqa: F401  (registers the operator)

    for step in (None, torch.tensor([2])):
        arguments = opcheck_arguments(CASES[name], impl="native", device_step=step)
        torch.library.opcheck(torch.ops.fastcifar.augment.default, arguments)


@pytest.mark.parametrize("name", ["given flips", "cutmix, all"])
def test_compiles_as_one_graph(name):
    images, indices, flips = inputs_of(9, 8)
    options = {**CASES[name], **DRAWS, "flips": flips}

    def mean_of(indices, step):
        made, partners, _ = functional.augment(images, indices, step=step, impl="native", **options)
        return made.mean((1, 2, 3)) * 2 + (0 if partners is None else partners)

    compiled = torch.compile(mean_of, fullgraph=True, backend="aot_eager")
    for step in (0, 1, 7, torch.tensor([5])):
        assert torch.equal(compiled(indices, step), mean_of(indices, step))
