"""GANs in training: steps, losses, bit-exact continuation, ranks, DiffAugment."""

import numpy
import pytest
import torch
import torch.nn.functional as F
from distributed_case import run_ranks
from training_case import result_of, status_of, write_tiny

from fastcifar import data, evaluate, generate
from fastcifar.training import checkpoint, distributed, recipe, sampling
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
    task._train_discriminator(0, 0, 1e-3)
    after = task.model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    # The generator's batch norms see a batch; its weights stay.
    assert all("running_" in n or "num_batches" in n for n in moved if n.startswith("generator."))
    assert any(n.startswith("discriminator.") and n.endswith("original") for n in moved)
    before = {name: tensor.clone() for name, tensor in after.items()}
    task._train_generator(0, 1e-3)
    moved = {name for name, tensor in task.model.state_dict().items() if not torch.equal(before[name], tensor)}
    assert moved and all(name.startswith("generator.") for name in moved)
    assert all(parameter.requires_grad for parameter in task.discriminator.parameters())


def test_losses_are_the_published_ones(tiny):
    real, fake = torch.tensor([0.5, -2.0, 3.0]), torch.tensor([-0.5, 2.0, -3.0])
    hinge = make(tiny, loss="hinge")._discriminator_loss(real, fake)
    assert float(hinge) == pytest.approx((0.5 + 3.0 + 0.0) / 3 + (0.5 + 3.0 + 0.0) / 3)
    task = make(tiny, model="dcgan")
    assert task.loss == "bce"
    expected = F.binary_cross_entropy_with_logits(real, torch.ones(3))
    expected += F.binary_cross_entropy_with_logits(fake, torch.zeros(3))
    torch.testing.assert_close(task._discriminator_loss(real, fake), expected)


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
    assert not torch.equal(u, before)  # the group made its step


def test_a_bad_step_changes_no_weight(tiny):
    task = make(tiny, model_ema_decay=0.0)
    task.train_step(0)
    before = [p.detach().clone() for p in task.discriminator.parameters()]
    with torch.no_grad():
        task.generator.to_image.weight.fill_(float("nan"))
    task._train_discriminator(1, 0, 1e-3)
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
    task._train_discriminator(1, 0, 0.0)
    task.sums.zero_()
    task.train_step(1)
    assert task.take_averages()["deviation"] < 0.02


def _train_on_ranks(rank, world_size, source, options):
    task = make(data.load_dataset(source), processes=distributed.Processes(rank, world_size, rank), **options)
    for step in range(2):
        task.train_step(step)
    return task.take_averages(), {name: tensor.numpy() for name, tensor in task.model.state_dict().items()}


@pytest.mark.parametrize("options", [{}, {"model": "dcgan"}], ids=["aw_sngan", "dcgan"])
def test_ranks_together_train_as_one_process(options, tmp_path):
    source = write_tiny(tmp_path / "tiny.npz", size=32)
    results = run_ranks(_train_on_ranks, 2, source, options)
    expected_averages, expected = _train_on_ranks(0, 1, source, options)
    del expected_averages["deviation"]  # within a process's own part of the batch
    for averages, tensors in results:
        averages = {name: averages[name] for name in expected_averages}
        assert averages == pytest.approx(expected_averages, rel=1e-3, abs=1e-4)
        for name, tensor in tensors.items():
            assert (tensor == results[0][1][name]).all(), name
            # Adam's first steps are of the size of the rate, whatever the gradient's.
            numpy.testing.assert_allclose(tensor, expected[name], rtol=2e-2, atol=2e-3, err_msg=name)


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


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run of a conditional GAN, judged by a classifier's run, and its data set."""
    folder = tmp_path_factory.mktemp("run")
    source = write_tiny(folder / "tiny.npz", size=32)
    common = ["--dataset", source, "--steps", "2", "-b", "8", "--amp-dtype", "fp32"]
    classifier = ["--model-option", "width=0.25", "--output", folder / "classifier"]
    assert status_of([*common, *classifier]) == 0
    gan = ["--model", "aw_sngan", "--classifier", folder / "classifier", "--metrics", "fd,kid,prdc"]
    gan += ["--metric-samples", "30", "--model-option", "width=4", "--model-option", "discriminator_width=2"]
    assert status_of([*common, *gan, "--output", folder / "gan"]) == 0
    return folder


def test_a_run_leaves_grids_metrics_and_its_result(run, capsys):
    from PIL import Image

    assert status_of(["--resume", run / "gan", "--dataset", f"npz:{run}/tiny.npz", "--eval-only"]) == 0
    result = result_of(capsys)
    assert {"fd", "kid", "precision", "extractor_sha256", "reference", "samples"} <= set(result)
    assert result["loss"] == "aw_hinge" and result["conditional"] and result["extractor"] == "classifier ds_resnet"
    samples = run / "gan" / "samples"
    assert {p.name for p in samples.iterdir()} == {"reals.png", "fakes-000001.png", "fakes-000002.png"}
    # Five classes of eight samples, each 34 pixels wide, twice as large.
    assert Image.open(samples / "fakes-000002.png").size == (8 * 34 * 2, 5 * 34 * 2)
    rows = (run / "gan" / "metrics.csv").read_text().splitlines()
    assert rows[0].startswith("step,epoch,learning_rate,loss_d,loss_g") and len(rows) == 3
    assert (run / "gan" / "curves.png").stat().st_size > 1000


def drawn(run, *arguments):
    return status_of(["--checkpoint", run / "gan", *arguments], generate.main, "python -m fastcifar.generate")


def test_generate_writes_sheets_sets_and_interpolations(run, tmp_path, capsys):
    from PIL import Image

    names = data.load_dataset(f"npz:{run}/tiny.npz").class_names
    assert drawn(run, "--output", tmp_path, "--classes", f"{names[2]},{names[0]}", "--seeds", "3-5,9") == 0
    assert Image.open(tmp_path / "sheet.png").size == (4 * 34 * 3, 2 * 34 * 3)
    first = (tmp_path / "sheet.png").read_bytes()
    assert drawn(run, "--output", tmp_path, "--classes", f"{names[2]},{names[0]}", "--seeds", "3-5,9") == 0
    assert (tmp_path / "sheet.png").read_bytes() == first
    assert drawn(run, "--output", tmp_path, "--count", "11") == 0
    with numpy.load(tmp_path / "samples-11.npz") as file:
        assert file["images"].shape == (11, 32, 32, 3) and file["labels"].shape == (11,)
    assert drawn(run, "--output", tmp_path, "--count", "3", "--format", "png") == 0
    assert len(list((tmp_path / "samples").rglob("*.png"))) == 3
    assert drawn(run, "--output", tmp_path, "--interpolate", f"{names[0]}:{names[4]}", "--frames", "5") == 0
    written = result_of(capsys)["written"]
    assert Image.open(written[0]).size == (5 * 34 * 3, 34 * 3)
    assert Image.open(written[1]).n_frames == 8


def test_interpolations_begin_and_end_at_their_classes(run):
    gan, names = generate.load_gan(checkpoint.find(run / "gan", notify=print))
    options = generate._parser().parse_args(
        ["--checkpoint", "x", "--interpolate", f"{names[1]}:{names[3]}", "--seeds", "5,6", "--frames", "4"]
    )
    frames = generate._interpolation(gan, names, options, CPU)
    gan, _ = generate.load_gan(checkpoint.find(run / "gan", notify=print))
    for frame, seed, label in ((frames[0], 5, 1), (frames[-1], 6, 3)):
        latents = generate._latent(gan, seed)[None]
        expected = sampling.to_uint8(sampling.generate(gan.generator, latents, torch.tensor([label])))[0]
        assert numpy.abs(frame.astype(int) - expected).max() <= 1


BAD_GENERATE = {
    "unknown class": (["--classes", "poppi"], "class"),
    "no interpolation": (["--interpolate", "poppy"], "poppy:apple"),
    "bad seeds": (["--seeds", "a-b"], "--seeds must be numbers"),
    "truncation": (["--truncation", "2"], "--truncation must lie in"),
    "format": (["--count", "3", "--format", "gif"], "--format"),
    "no images": (["--count", "0"], "--count must be ≥ 1"),
}


@pytest.mark.parametrize(("arguments", "words"), BAD_GENERATE.values(), ids=BAD_GENERATE.keys())
def test_generate_refuses_in_one_line(arguments, words, run, tmp_path, capsys):
    assert drawn(run, "--output", tmp_path, *arguments) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and words in error


def test_evaluate_refuses_a_gan(run, capsys):
    assert status_of(["--checkpoint", run / "gan"], evaluate.main, "python -m fastcifar.evaluate") == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "holds the GAN aw_sngan" in error and "--eval-only" in error


def test_generate_refuses_a_classifier(run, capsys):
    assert status_of(["--checkpoint", run / "classifier"], generate.main, "python -m fastcifar.generate") == 2
    assert "holds the classifier ds_resnet" in capsys.readouterr().err


BAD = {
    "classifier's option": ["--model", "aw_sngan", "--mixup", "1"],
    "test-time augmentation": ["--model", "dcgan", "--tta"],
    "unknown loss": ["--model", "aw_sngan", "--loss", "wgan"],
    "unknown policy": ["--model", "aw_sngan", "--diffaugment", "colour"],
    "unknown metric": ["--model", "aw_sngan", "--metrics", "fid"],
    "fp16": ["--model", "aw_sngan", "--amp-dtype", "fp16"],
    "sgd": ["--model", "aw_sngan", "--opt", "sgd"],
    "absent classifier": ["--model", "aw_sngan", "--classifier", "absent"],
    "GAN's option": ["--model", "ds_resnet", "--unconditional"],
    "width": ["--model", "aw_sngan", "--model-option", "width=0"],
}


@pytest.mark.parametrize("arguments", BAD.values(), ids=BAD.keys())
def test_a_wrong_command_line_is_one_line_and_status_2(arguments, run, tmp_path, capsys):
    output = tmp_path / "run"
    assert status_of(["--dataset", f"npz:{run}/tiny.npz", "--output", output, *arguments]) == 2
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 1 and not output.exists()


def test_other_sizes_than_32_are_refused(tmp_path, capsys):
    source = write_tiny(tmp_path / "small.npz", size=12)
    assert status_of(["--dataset", source, "--model", "dcgan", "--output", tmp_path / "run"]) == 2
    assert "draws 32×32 images" in capsys.readouterr().err
