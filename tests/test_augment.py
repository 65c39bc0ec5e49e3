"""The augmentations in plain PyTorch: against NumPy and torchvision; choice of implementation; bad input."""

import pytest
import resident_oracle
import torch
from augment_case import CASES, DRAWS, MEAN, SEED, STD, hold_to_the_oracle, inputs_of, run, same

from fastcifar import dispatch, functional
from fastcifar.data import Augmentation

OPTIONS = pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@OPTIONS
def test_the_reference_equals_the_oracle(options, dtype):
    hold_to_the_oracle("reference", options, dtype)


@pytest.fixture(scope="module")
def transforms():
    try:
        from torchvision.transforms.v2 import functional
    except Exception as error:
        pytest.skip(f"torchvision cannot be imported here: {error}")
    return functional


@pytest.mark.parametrize("crop_mode", ["reflect", "zero"])
def test_the_reference_equals_torchvision(transforms, crop_mode):
    """torchvision's operations with the parameters that were drawn here."""
    options = {"crop_pad": 3, "crop_mode": crop_mode, "random_flip": True, "color_jitter": 0.4, "cutout": 4}
    images, indices, _ = inputs_of(9, 8)
    made = run("reference", options, dtype=torch.float64)[0]
    mirrored = 0
    for position, index in enumerate(indices):
        geometry, colour, cut = (resident_oracle.philox_words(position, 3, purpose, SEED) for purpose in range(3))
        image = images[index].permute(2, 0, 1).double() / 255
        image = transforms.pad(image, [3] * 4, padding_mode="reflect" if crop_mode == "reflect" else "constant")
        image = transforms.crop(image, geometry[0] * 7 >> 32, geometry[1] * 7 >> 32, 9, 8)
        if geometry[2] >= 2**31:
            image, mirrored = transforms.horizontal_flip(image), mirrored + 1
        factors = [1 + 0.4 * (2 * (word + 0.5) / 2**32 - 1) for word in colour[:3]]
        image = transforms.adjust_brightness(image, factors[0])
        image = transforms.adjust_contrast(image, factors[1])
        image = transforms.adjust_saturation(image, factors[2])
        image = transforms.normalize(image, MEAN, STD)
        top, left = (cut[0] * 9 >> 32) - 2, (cut[1] * 8 >> 32) - 2
        height, width = min(top + 4, 9) - max(top, 0), min(left + 4, 8) - max(left, 0)
        image = transforms.erase(image, max(top, 0), max(left, 0), height, width, torch.zeros(3, 1, 1).double())
        # torchvision computes grey images in float64 too; only the factors are float32 here.
        torch.testing.assert_close(made[position], image, rtol=0, atol=2e-6)
    assert 0 < mirrored < len(indices)


@OPTIONS
def test_a_step_on_the_device_and_parts_of_the_batch_change_nothing(options):
    whole = run("reference", options)
    assert same(whole, run("reference", options, step=torch.tensor([3])))
    assert same(whole, run("reference", options, step=torch.tensor(3)))
    parts = [run("reference", options, first=first, count=count) for first, count in ((0, 5), (5, 0), (5, 7))]
    for field, value in enumerate(whole):
        if value is not None:
            assert torch.equal(torch.cat([part[field] for part in parts]), value)


def test_a_single_image_is_its_own_partner():
    images, indices, _ = inputs_of(9, 8)
    for mixing in ({"mixup": 1.0}, {"cutmix": 1.0}):
        made, partners, _ = functional.augment(images, indices[:1], step=0, impl="reference", **mixing, **DRAWS)
        assert torch.equal(partners, indices[:1])
        expected = functional.augment(images, indices[:1], step=0, impl="reference", **DRAWS)[0]
        torch.testing.assert_close(made, expected)


def test_auto_takes_a_kernel_and_says_so():
    call = dispatch.Call(torch.device("cpu"), torch.bfloat16)
    lines = dispatch.explain("augment", call).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["triton", "native", "reference"]
    assert "cannot run: the compiled core computes float32" in dispatch.explain(
        "augment", dispatch.Call(torch.device("cpu"), torch.float64)
    )
    assert torch.equal(run("auto", {})[0], run("reference", {})[0])


def test_options_of_the_loader_are_those_of_the_function():
    assert Augmentation(crop_pad=2, hflip="random").options == {
        "crop_pad": 2, "crop_mode": "reflect", "color_jitter": 0.0, "cutout": 0, "mixup": 0.0, "cutmix": 0.0,
    }  # fmt: skip


IMAGES, INDICES, _ = inputs_of(9, 8)
BAD_CALLS = [
    ({"images": IMAGES.float()}, ValueError, r"images must be uint8 \(N, H, W, 3\), got torch.float32 \(37, 9, 8, 3\)"),
    ({"images": IMAGES[..., :2]}, ValueError, r"images must be uint8 \(N, H, W, 3\), .* \(37, 9, 8, 2\)"),
    ({"images": IMAGES.mT}, ValueError, "images must be uint8"),
    ({"images": IMAGES[:, ::2]}, ValueError, "images must be contiguous, once for all calls"),
    ({"images": IMAGES[:0]}, ValueError, r"got torch.uint8 \(0, 9, 8, 3\)"),
    ({"indices": INDICES.int()}, ValueError, r"indices must be int64 \(B,\), got torch.int32"),
    ({"indices": INDICES[:, None]}, ValueError, r"got torch.int64 \(12, 1\)"),
    ({"flips": torch.zeros(12)}, ValueError, r"flips must be bool \(12,\) like indices, got torch.float32"),
    ({"flips": torch.zeros(12, dtype=torch.bool), "random_flip": True}, ValueError, "random_flip must be False"),
    ({"step": -1}, ValueError, r"step must lie in \[0, 2\^63\), got -1"),
    ({"step": torch.tensor([1, 2])}, ValueError, r"must be one int64 number, got torch.int64 \(2,\)"),
    ({"step": torch.tensor(1.0)}, ValueError, "must be one int64 number, got torch.float32"),
    ({"seed": 1 << 63}, ValueError, r"seed must lie in \[0, 2\^63\)"),
    ({"first": 3, "count": 10}, ValueError, "positions 3 … 13 are not within the 12 indices"),
    ({"first": -1}, ValueError, "positions -1 …"),
    ({"mean": (0.5, 0.5)}, ValueError, "mean and std must be three numbers each"),
    ({"std": (0.5, 0.0, 1.0)}, ValueError, r"std > 0, got .* \(0.5, 0.0, 1.0\)"),
    ({"dtype": torch.int8}, TypeError, "dtype must be floating point, got torch.int8"),
    ({"crop_pad": 8}, ValueError, r"crop_pad 8 must be below the image size \(9, 8\) to reflect"),
    ({"crop_pad": 1.5}, ValueError, "crop_pad must be a whole number of pixels"),
    ({"crop_mode": "mirror"}, ValueError, "unknown crop_mode 'mirror'"),
    ({"color_jitter": 1.5}, ValueError, r"color_jitter must lie in \[0, 1\], got 1.5"),
    ({"cutout": -2}, ValueError, "cutout must be a whole number of pixels .* got -2"),
    ({"mixup": 1.0, "cutmix": 1.0}, ValueError, "exclude each other"),
    ({"mixup": float("nan")}, ValueError, "mixup must be ≥ 0 and finite, got nan"),
    ({"impl": "cuda"}, ValueError, "unknown impl 'cuda'"),
    ({"impl": "native", "dtype": torch.float64}, RuntimeError, 'impl="native" cannot run here'),
]


@pytest.mark.parametrize(
    ("change", "error", "message"), BAD_CALLS, ids=[f"{'+'.join(c)} {i}" for i, (c, *_) in enumerate(BAD_CALLS)]
)
def test_bad_calls_name_the_values(change, error, message):
    arguments = {"images": IMAGES, "indices": INDICES, "step": 0, **DRAWS, **change}
    with pytest.raises(error, match=message):
        functional.augment(**arguments)


def test_tensors_on_several_devices_are_named():
    with pytest.raises(ValueError, match="indices is on meta but images is on cpu"):
        functional.augment(IMAGES, INDICES.to("meta"), step=0, **DRAWS)
