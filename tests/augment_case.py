"""Batches that every implementation of the augmentations has to make, and what they are compared with."""

import functools

import numpy
import oracle
import resident_oracle
import torch

from fastcifar import functional, reference_augment
from fastcifar.data import Augmentation, ResidentLoader

MEAN, STD, SEED = (0.5, 0.45, 0.4), (0.25, 0.2, 0.3), 11
DRAWS = {"seed": SEED, "mean": MEAN, "std": STD}
CASES = {
    "plain": {},
    "reflect": {"crop_pad": 3},
    "zero": {"crop_pad": 9, "crop_mode": "zero"},
    "random flip": {"random_flip": True},
    "given flips": {"flips": True, "crop_pad": 1},
    "jitter": {"color_jitter": 0.1},
    "strong jitter": {"color_jitter": 1.0, "crop_pad": 2, "crop_mode": "zero", "random_flip": True},
    "cutout": {"cutout": 5},
    "large cutout": {"cutout": 100, "crop_pad": 2},
    "mixup": {"mixup": 0.3, "crop_pad": 2, "random_flip": True},
    "cutmix": {"cutmix": 1.0, "crop_pad": 2, "flips": True},
    "mixup, all": {"mixup": 8.0, "crop_pad": 3, "random_flip": True, "color_jitter": 0.4, "cutout": 4},
    "cutmix, all": {"cutmix": 0.5, "crop_pad": 3, "crop_mode": "zero", "flips": True, "color_jitter": 0.4, "cutout": 4},
}  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@functools.cache
def inputs_of(height, width, count=37, batch=12):
    """A set, and indices and flips of a batch of it."""
    generator = torch.Generator().manual_seed(height * 1000 + width)
    images = torch.randint(0, 256, (count, height, width, 3), generator=generator, dtype=torch.uint8)
    indices = torch.randint(0, count, (batch,), generator=generator)
    return images, indices, torch.rand(batch, generator=generator) < 0.5


def run(impl, options, size=(9, 8), device="cpu", **changes):
    """The images and partners of a batch; `options` of `CASES`."""
    images, indices, flips = (tensor.to(device) for tensor in inputs_of(*size))
    arguments = {"step": 3, **DRAWS, **options, **changes}
    if options.get("flips"):
        arguments["flips"] = flips
    return functional.augment(images, indices, impl=impl, **arguments)


def same(one, two):
    """Whether two results are equal to the bit."""
    return all((a is None and b is None) or torch.equal(a, b) for a, b in zip(one, two, strict=True))


def hold(impl, options, dtype=torch.float32, size=(9, 8), device="cpu", exact=True, **changes):
    """Partners and shares equal the reference's; the images are equal to the bit without jitter (and with `exact`),
    otherwise within the budget of `oracle.within`."""
    found, low = (run(i, options, size, device, dtype=dtype, **changes) for i in (impl, "reference"))
    assert found[0].dtype == dtype and found[0].shape == low[0].shape
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    if exact:
        assert same(found[1:], low[1:])
    if exact and not options.get("color_jitter"):
        assert torch.equal(found[0], low[0])
        return
    true = run("reference", options, size, device, dtype=torch.float64, **changes)
    oracle.within(found[0].double(), true[0], low[0].double(), dtype)


def hold_to_the_oracle(impl, options, dtype=torch.float32, device="cpu"):
    """Every image of a loader's batches equals the slow NumPy oracle's."""
    images, labels = inputs_of(8, 7)[0].numpy(), numpy.arange(37) % 10
    hflip = "alternating" if "flips" in options else "random" if "random_flip" in options else "off"
    options = {name: value for name, value in options.items() if name not in ("flips", "random_flip")}
    augmentation = Augmentation(hflip=hflip, **options)
    loader = ResidentLoader(
        images, labels, batch_size=10, num_classes=10, augmentation=augmentation, dtype=dtype, device=device, impl=impl,
        **DRAWS,
    )  # fmt: skip
    for step in (0, 5):
        batch = loader.batch(step)
        for position in range(10):
            expected, index, other, share = _expected(images, step, position, augmentation)
            assert batch.labels[position] == labels[index]
            if augmentation.mixup or augmentation.cutmix:
                assert batch.partner_labels[position] == labels[other]
                assert abs(float(batch.partner_weight[position]) - share) < 1e-6
            difference = batch.images[position].permute(1, 2, 0).double().cpu().numpy() - expected
            assert abs(difference).max() < 4e-6 + torch.finfo(dtype).eps / 2 * abs(expected).max()


def _expected(images, step, position, options):
    """The image, its index, its partner's and the partner's share."""
    image, index = resident_oracle.sample(images, SEED, step, 10, position, options, MEAN, STD)
    if not (options.mixup or options.cutmix):
        return image, index, None, None
    other = resident_oracle.partner(position, SEED, step, 10)
    partner, partner_index = resident_oracle.sample(images, SEED, step, 10, other, options, MEAN, STD)
    words = torch.tensor(resident_oracle.philox_words(position, step, 4, SEED))
    share = float(reference_augment.beta(options.mixup or options.cutmix, words[:1], words[1:2]))
    if options.mixup:
        return (1 - share) * image + share * partner, index, partner_index, share
    made, share = resident_oracle.cutmixed(image, partner, position, SEED, step, share)
    return made, index, partner_index, share


def opcheck_arguments(options, device="cpu", **changes):
    """Arguments of the operator itself."""
    images, indices, flips = (tensor.to(device) for tensor in inputs_of(5, 6))
    given = {
        "flips": None, "device_step": None, "step": 3, "first": 0, "count": len(indices), "random_flip": False,
        "crop_pad": 0, "crop_mode": "reflect", "color_jitter": 0.0, "cutout": 0, "mixup": 0.0, "cutmix": 0.0,
        "dtype": torch.float32, **DRAWS, **options, **changes,
    }  # fmt: skip
    if options.get("flips"):
        given["flips"] = flips
    schema = torch.ops.fastcifar.augment.default._schema
    return images, indices, *(given[argument.name] for argument in schema.arguments[2:])
