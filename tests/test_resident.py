"""The resident loader against a slow oracle, and the laws its batches keep."""

import math

import numpy
import pytest
import resident_oracle as oracle
import torch
from distributed_case import run_ranks

from fastcifar import philox, reference_augment
from fastcifar.data import Augmentation, ResidentLoader, evaluation_batches

MEAN, STD = (0.5, 0.45, 0.4), (0.25, 0.2, 0.3)
GENERATOR = numpy.random.default_rng(5)
IMAGES = GENERATOR.integers(0, 256, (37, 8, 7, 3), dtype=numpy.uint8)
LABELS = GENERATOR.integers(0, 10, 37)
SEED = 11


def loader(images=IMAGES, labels=LABELS, batch_size=10, seed=SEED, dtype=torch.float32, augmentation=None, **options):
    settings = {"mean": MEAN, "std": STD, "seed": seed, "dtype": dtype, "num_classes": 10, "batch_size": batch_size}
    return ResidentLoader(images, labels, augmentation=augmentation or Augmentation(**options), **settings)


CASES = {
    "plain": {},
    "crop reflect": {"crop_pad": 3},
    "crop zero": {"crop_pad": 4, "crop_mode": "zero"},
    "flip random": {"hflip": "random"},
    "flip alternating": {"hflip": "alternating", "crop_pad": 1},
    "jitter": {"color_jitter": 0.4},
    "cutout": {"cutout": 3},
    "everything": {"crop_pad": 2, "hflip": "random", "color_jitter": 1.0, "cutout": 5},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_batches_equal_the_oracle(options):
    made = loader(**options)
    for step in (0, 3, 9):
        batch = made.batch(step)
        for position in range(10):
            expected, index = oracle.sample(IMAGES, SEED, step, 10, position, made.augmentation, MEAN, STD)
            assert batch.labels[position] == LABELS[index]
            difference = batch.images[position].permute(1, 2, 0).double().numpy() - expected
            assert abs(difference).max() < 2e-6


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixing_equals_the_oracle(kind):
    made = loader(**{kind: 0.7, "crop_pad": 2, "hflip": "random"})
    for step in (1, 5):
        batch = made.batch(step)
        for position in range(10):
            other = oracle.partner(position, SEED, step, 10)
            assert other != position
            image, _ = oracle.sample(IMAGES, SEED, step, 10, position, made.augmentation, MEAN, STD)
            partner, index = oracle.sample(IMAGES, SEED, step, 10, other, made.augmentation, MEAN, STD)
            words = torch.tensor(oracle.philox_words(position, step, 4, SEED))
            share = float(reference_augment.beta(0.7, words[:1], words[1:2]))
            if kind == "cutmix":
                expected, share = oracle.cutmixed(image, partner, position, SEED, step, share)
            else:
                expected = (1 - share) * image + share * partner
            assert batch.partner_labels[position] == LABELS[index]
            assert float(batch.partner_weight[position]) == pytest.approx(share, abs=1e-6)
            assert abs(batch.images[position].permute(1, 2, 0).double().numpy() - expected).max() < 4e-6


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0, 2.0, 8.0])
def test_beta_variates_have_the_moments_of_the_distribution(alpha):
    words = philox.philox(torch.arange(200_000), 0, 0, 3)
    values = reference_augment.beta(alpha, words[0], words[1])
    variance = 1 / (4 * (2 * alpha + 1))
    fourth = 3 / (16 * (2 * alpha + 1) * (2 * alpha + 3))
    assert abs(values.mean() - 0.5) < 5 * math.sqrt(variance / 200_000)
    assert abs((values - 0.5).square().mean() - variance) < 5 * math.sqrt((fourth - variance**2) / 200_000)
    assert abs((values - 0.5).pow(4).mean() - fourth) < 0.02 * fourth


def drawn_indices(made, steps):
    return [made.plan(step).indices.numpy() for step in range(steps)]


def test_each_index_occurs_once_an_epoch_and_the_remainder_carries_over():
    sequence = numpy.concatenate(drawn_indices(loader(), 37))
    for epoch in range(10):
        part = sequence[epoch * 37 : (epoch + 1) * 37]
        assert sorted(part) == list(range(37))
    assert (sequence[:37] != sequence[37:74]).any()


def test_a_batch_larger_than_the_set_holds_whole_epochs():
    indices = loader(batch_size=74).plan(0).indices.tolist()
    assert sorted(indices) == sorted([*range(37), *range(37)])


ALL = {"crop_pad": 2, "hflip": "alternating", "color_jitter": 0.2, "cutout": 2}


def equal(one, two):
    return all((a is None and b is None) or torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("mixing", [{}, {"mixup": 0.5}, {"cutmix": 1.0}], ids=["none", "mixup", "cutmix"])
def test_a_batch_is_a_pure_function_of_its_step(mixing):
    used = loader(**ALL, **mixing)
    for step in (4, 0, 2):
        used.batch(step)
    assert equal(used.batch(7), loader(**ALL, **mixing).batch(7))
    assert not torch.equal(used.batch(7).images, used.batch(8).images)


def test_seeds_differ():
    assert not torch.equal(loader(**ALL).batch(0).images, loader(seed=12, **ALL).batch(0).images)


@pytest.mark.parametrize("mixing", [{}, {"mixup": 0.5}, {"cutmix": 1.0}], ids=["none", "mixup", "cutmix"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_one_global_batch(world_size, mixing):
    settings = {"batch_size": 12, "num_classes": 10, "seed": SEED, "mean": MEAN, "std": STD}
    settings["augmentation"] = Augmentation(**ALL, **mixing)
    for step in (0, 3):
        whole = ResidentLoader(IMAGES, LABELS, **settings).batch(step)
        parts = [
            ResidentLoader(IMAGES, LABELS, rank=rank, world_size=world_size, **settings).batch(step)
            for rank in range(world_size)
        ]
        for field, value in enumerate(whole):
            if value is not None:
                assert torch.equal(torch.cat([part[field] for part in parts]), value)


def chi_square(counts):
    expected = sum(counts) / len(counts)
    return sum((count - expected) ** 2 / expected for count in counts)


def test_shifts_and_flips_are_uniform():
    words = philox.philox(torch.arange(512), 0, 0, SEED)
    words = torch.cat([philox.philox(torch.arange(512), step, 0, SEED) for step in range(100)], 1)
    shifts = philox.below(words[0], 9) * 9 + philox.below(words[1], 9)
    # 99.9 % quantiles of chi-square with 80 and 1 degrees of freedom.
    assert chi_square(torch.bincount(shifts, minlength=81).tolist()) < 124.84
    assert chi_square(torch.bincount(words[2] >> 31, minlength=2).tolist()) < 10.83


def test_alternating_flips_mirror_each_image_in_every_second_epoch():
    image = numpy.zeros((36, 4, 4, 3), numpy.uint8)
    image[:, :, 0] = 255
    made = loader(image, numpy.zeros(36, numpy.int64), batch_size=36, hflip="alternating")
    mirrored = []
    for step in range(4):
        left = made.batch(step).images[:, 0, 0, 0] < made.batch(step).images[:, 0, 0, 3]
        indices = made.plan(step).indices.numpy()
        mirrored.append({int(i) for i, is_mirrored in zip(indices, left, strict=True) if is_mirrored})
    assert mirrored[0] == mirrored[2] and mirrored[1] == mirrored[3]
    assert mirrored[0] | mirrored[1] == set(range(36)) and not mirrored[0] & mirrored[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_layout_and_dtype(dtype):
    batch = loader(dtype=dtype, **ALL).batch(0)
    assert batch.images.dtype == dtype and batch.images.shape == (10, 3, 8, 7)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.partner_labels is None and batch.partner_weight is None


def test_evaluation_batches_are_in_order_and_not_augmented():
    batches = list(evaluation_batches(IMAGES, LABELS, batch_size=10, mean=MEAN, std=STD))
    assert [len(labels) for _, labels in batches] == [10, 10, 10, 7]
    images = torch.cat([images for images, _ in batches]).permute(0, 2, 3, 1).double().numpy()
    assert abs(images - (IMAGES / 255 - MEAN) / STD).max() < 1e-6
    assert torch.cat([labels for _, labels in batches]).tolist() == LABELS.tolist()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Augmentation(crop_mode="mirror"), "unknown crop_mode 'mirror'"),
        (lambda: Augmentation(hflip="of"), "did you mean 'off'"),
        (lambda: Augmentation(crop_pad=-1), "crop_pad must be .* got -1"),
        (lambda: Augmentation(color_jitter=1.5), "got 1.5"),
        (lambda: Augmentation(mixup=1.0, cutmix=1.0), "exclude each other"),
        (lambda: loader(crop_pad=7), "crop_pad 7 must be below"),
        (lambda: loader(labels=LABELS + 5), r"labels in \[0, 9\]"),
        (lambda: loader(IMAGES.astype(float)), "must be uint8"),
        (lambda: loader(batch_size=0), "batch_size 0"),
    ],
    ids=["crop mode", "flip", "padding", "jitter", "both mixes", "large padding", "labels", "dtype", "batch"],
)
def test_bad_options_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def sharded_batches(rank, world_size, steps):
    """The most images that this rank keeps, and whether each sharded batch is the replicated one."""
    settings = {"batch_size": 12, "num_classes": 10, "seed": SEED, "mean": MEAN, "std": STD}
    kept, same = 0, []
    for mixing in ({}, {"mixup": 0.5}, {"cutmix": 1.0}):
        settings |= {"augmentation": Augmentation(**ALL, **mixing), "rank": rank, "world_size": world_size}
        whole = ResidentLoader(IMAGES, LABELS, **settings)
        part = ResidentLoader(IMAGES, LABELS, placement="sharded", **settings)
        kept = max(kept, len(part._shard._own))
        same += [equal(whole.batch(step), part.batch(step)) for step in steps]
    return kept, same


@pytest.mark.parametrize("world_size", [2, 4])
def test_shards_give_the_same_batches(world_size):
    # The fourth batch of 12 lies in two epochs of 37 images.
    for kept, same in run_ranks(sharded_batches, world_size, (0, 3, 2)):
        assert kept <= math.ceil(37 / world_size) and all(same) and len(same) == 9


def test_shards_need_their_processes():
    with pytest.raises(ValueError, match="start them with torchrun"):
        ResidentLoader(
            IMAGES, LABELS, batch_size=12, num_classes=10, mean=MEAN, std=STD, world_size=2, placement="sharded"
        )
