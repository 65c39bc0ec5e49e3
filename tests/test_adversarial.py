"""GANs in training: steps, losses, bit-exact continuation, ranks, DiffAugment."""

import dataclasses

import numpy
import pytest
import torch
import torch.nn.functional as F
from training_case import write_tiny

from fastcifar import data
from fastcifar.training import checkpoint, distributed, gan, recipe, sampling
from fastcifar.training.adversarial import Adversarial
from fastcifar.training.diff_augment import NUMBERS, diff_augment

CPU = torch.device("cpu")
SMALL = {"aw_sngan": {"width": 4, "discriminator_width": 2, "latent_dim": 8}, "dcgan": {"width": 2, "latent_dim": 8}}
SMALL["aw_sngan_res"] = {"width": 4, "discriminator_width": 4, "latent_dim": 8}
SMALL["aw_sngan_light"] = SMALL["aw_sngan"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return data.load_dataset(write_tiny(tmp_path_factory.mktemp("data") / "tiny.npz", size=32))


def make(dataset, model="aw_sngan", processes=None, **options):
    settings = {"model": model, "model_options": SMALL[model], "amp_dtype": "fp32", "batch_size": 8, "steps": 8}
    chosen = recipe.with_budget(recipe.resolve({**settings, **options}, has_gpu=False), len(dataset.train_images))
    return Adversarial(chosen, dataset, CPU, processes or distributed.Processes())


VARIANTS = {
    "aw_sngan": {},
    "five steps, averaged, augmented": {"n_dis": 3, "diffaugment": "color,translation,cutout"},
    "not conditional": {"unconditional": True},
    "dcgan": {"model": "dcgan"},
    "hinge": {"loss": "hinge", "model_ema_decay": 0.0},
    "residual": {"model": "aw_sngan_res"},
    "light, bf16": {"model": "aw_sngan_light", "amp_dtype": "bf16"},
    "minibatch deviation": {"model_options": {**SMALL["aw_sngan"], "minibatch_deviation": True}},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
def test_continuing_is_bit_exact(options, tiny, tmp_path):
    whole = make(tiny, **options)
    for step in range(4):
        whole.train_step(step)
    first = make(tiny, **options)
    for step in range(2):
        first.train_step(step)
    saved = checkpoint.load(checkpoint.save(tmp_path, 2, *first.state()))
    second = make(tiny, **options)
    torch.manual_seed(999)
    second.load_state(saved)
    for step in range(2, 4):
        second.train_step(step)
    assert checkpoint.state_sha256(second.state()[0]) == checkpoint.state_sha256(whole.state()[0])
    averages = second.take_averages()
    assert averages == whole.take_averages() and all(numpy.isfinite(list(averages.values())))
    assert int(second.bad_steps) == 0


def test_each_network_is_trained_by_its_own_loss(tiny):
    task = make(tiny, loss="hinge", model_ema_decay=0.0)
    before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    task.place(0)
    task._train_discriminator(0)
    after = task.model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    # The generator's batch norms see a batch; its weights stay.
    assert all("running_" in n or "num_batches" in n for n in moved if n.startswith("generator."))
    assert any(n.startswith("discriminator.") and n.endswith("original") for n in moved)
    before = {name: tensor.clone() for name, tensor in after.items()}
    task._train_generator()
    moved = {name for name, tensor in task.model.state_dict().items() if not torch.equal(before[name], tensor)}
    assert moved and all(name.startswith("generator.") for name in moved)
    assert all(parameter.requires_grad for parameter in task.discriminator.parameters())


def test_losses_are_the_published_ones(tiny):
    real, fake = torch.tensor([0.5, -2.0, 3.0]), torch.tensor([-0.5, 2.0, -3.0])
    hinge = gan.discriminator_loss("hinge", real, fake)
    assert float(hinge) == pytest.approx((0.5 + 3.0 + 0.0) / 3 + (0.5 + 3.0 + 0.0) / 3)
    assert make(tiny, model="dcgan").loss == "bce"
    expected = F.binary_cross_entropy_with_logits(real, torch.ones(3))
    expected += F.binary_cross_entropy_with_logits(fake, torch.zeros(3))
    torch.testing.assert_close(gan.discriminator_loss("bce", real, fake), expected)
    assert float(gan.generator_loss("aw_hinge", fake)) == pytest.approx(0.5)
    expected = F.binary_cross_entropy_with_logits(fake, torch.ones(3))
    torch.testing.assert_close(gan.generator_loss("nonsaturating", fake), expected)


def test_real_and_generated_images_meet_the_same_discriminator(tiny):
    task = make(tiny)
    seen = []
    task.discriminator.convolutions[0].register_forward_hook(
        lambda module, inputs, output: seen.append(module.weight.detach().clone())
    )
    u = task.discriminator.convolutions[0].parametrizations.weight[0]._u
    before = u.clone()
    task.train_step(0)
    assert len(seen) == 3 and torch.equal(seen[0], seen[1])
    # The generator meets the discriminator after its update.
    task.spectral.invalidate()
    assert torch.equal(seen[2], task.discriminator.convolutions[0].weight) and not torch.equal(seen[2], seen[1])
    assert not torch.equal(u, before)  # the group made its step


def test_a_bad_step_changes_no_weight(tiny):
    task = make(tiny, model_ema_decay=0.0)
    task.train_step(0)
    before = [p.detach().clone() for p in task.discriminator.parameters()]
    with torch.no_grad():
        task.generator.to_image.weight.fill_(float("nan"))
    task.place(1)
    task._train_discriminator(0)
    assert all(torch.equal(p, old) for p, old in zip(task.discriminator.parameters(), before, strict=True))
    assert int(task.bad_steps) == 1 and int(task.first_bad) == 1


def test_collapse_and_saturation_are_warned_of(tiny):
    task = make(tiny)
    task.train_step(0)
    row = {**task.take_averages(), **task.tick(1, 1, 2.0)}
    assert task.watch(row) is None and row["deviation"] > 0.02
    assert row["kimg"] == 0.008 and row["seconds_per_kimg"] == 250.0 and row["memory_mib"] > 50
    assert "collapsed" in task.watch({**row, "deviation": 0.001})
    assert "tells all images apart" in task.watch({**row, "score_real": 0.999, "score_fake": 0.001})
    with torch.no_grad():
        task.generator.to_image.weight.zero_()
    task.train_step(1)
    assert task.take_averages()["deviation"] < 0.02


def plain_diff_augment(image, policies, numbers):
    """One image [C, H, W], as the published code does it, loop by loop."""
    size = image.shape[-1]
    if "color" in policies:
        image = image + (numbers[0] - 0.5)
        mean = image.mean(0, keepdim=True)
        image = (image - mean) * (numbers[1] * 2) + mean
        mean = image.mean()
        image = (image - mean) * (numbers[2] + 0.5) + mean
    if "translation" in policies:
        most = int(size / 8 + 0.5)
        down, right = (int(number * (2 * most + 1)) - most for number in numbers[3:5])
        moved = torch.zeros_like(image)
        for i in range(size):
            for j in range(size):
                if 0 <= i + down < size and 0 <= j + right < size:
                    moved[:, i, j] = image[:, i + down, j + right]
        image = moved
    if "cutout" in policies:
        length = int(size / 2 + 0.5)
        middles = [int(number * (size + 1 - length % 2)) for number in numbers[5:]]
        rows, columns = ({middle + k - length // 2 for k in range(length)} for middle in middles)
        image = image.clone()
        for i in rows & set(range(size)):
            for j in columns & set(range(size)):
                image[:, i, j] = 0
    return image


@pytest.mark.parametrize("policies", [("color",), ("translation",), ("cutout",), ("color", "translation", "cutout")])
def test_diff_augment_is_the_published_one(policies):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(12, 3, 8, 8, generator=generator, dtype=torch.float64) * 2 - 1
    numbers = torch.rand(12, NUMBERS, generator=generator)
    expected = torch.stack([plain_diff_augment(i, policies, n) for i, n in zip(images, numbers, strict=True)])
    torch.testing.assert_close(diff_augment(images, policies, numbers), expected, rtol=1e-6, atol=1e-6)
    leaf = images[:2].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: diff_augment(x, policies, numbers[:2].double()), leaf)


def test_draws_depend_on_seed_and_number_alone(tiny):
    gan = make(tiny).model
    one, same, other = (sampling.draw(gan, 0, number, 4, 2) for number in (5, 5, 6))
    assert torch.equal(one.latents, same.latents) and torch.equal(one.labels, same.labels)
    assert not torch.equal(one.latents, other.latents)
    assert not torch.equal(one.latents, sampling.draw(gan, 1, 5, 4, 2).latents)


def test_epochs_are_passes_over_the_images_however_many_discriminator_steps(tiny):
    task = make(tiny, n_dis=3, steps=None, epochs=6)
    assert task.recipe.steps == 25 and task.epoch(25) == pytest.approx(6.0, abs=0.3)


def test_other_images_or_classes_are_another_run(tiny, tmp_path):
    saved = checkpoint.load(checkpoint.save(tmp_path, 0, *make(tiny).state()))
    with pytest.raises(checkpoint.CheckpointError, match="was trained on other images"):
        make(dataclasses.replace(tiny, train_images=tiny.train_images // 2)).load_state(saved)
    names = ("x", *tiny.class_names[1:])
    with pytest.raises(checkpoint.CheckpointError, match="knows other classes .* 'class 0' there is 'x' here"):
        make(dataclasses.replace(tiny, class_names=names)).load_state(saved)


def test_grids_of_small_sets(tiny, tmp_path):
    few = dataclasses.replace(tiny, train_images=tiny.train_images[:7], train_labels=tiny.train_labels[:7])
    for name, options in {"conditional": {}, "plain": {"unconditional": True}}.items():
        task = make(few, **options)
        sampling.write_grids(tmp_path / name, 0, task.generator, task.model, few, CPU)
        assert (tmp_path / name / "reals.png").stat().st_size > 100
