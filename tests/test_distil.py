"""Distillation: the loss, the teacher's part in a step, and teachers that cannot teach."""

import shutil

import numpy
import pytest
import torch
from test_capture import NothingFromTheHost
from test_training import everything, make
from training_case import result_of, status_of, write_tiny

from fastcifar import data
from fastcifar.training import answers, checkpoint
from fastcifar.training.capture import Feed
from fastcifar.training.distil import Teacher, distillation_loss


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return data.load_dataset(write_tiny(tmp_path_factory.mktemp("data") / "tiny.npz"))


@pytest.fixture(scope="module")
def teacher(tiny, tmp_path_factory):
    """The run of a trained classifier; its averaged weights differ from the last ones."""
    return save(tiny, tmp_path_factory.mktemp("teacher"), seed=3)


def save(tiny, folder, **options):
    task = make(tiny, steps=40, lr=0.1, crop_pad=0, model_ema_decay=0.8, **options)
    for step in range(40):
        task.train_step(step)
    tensors, state = task.state()
    config = {"model": "ds_resnet", "model_options": {"width": 0.25}}
    checkpoint.save(folder / "checkpoints", 40, tensors, {**state, "config": config})
    return str(folder)


def test_the_loss_is_the_definition():
    torch.manual_seed(0)
    student, teacher = (torch.randn(6, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for temperature in (1.0, 4.0):
        p, q = (torch.softmax(logits / temperature, 1) for logits in (teacher, student))
        expected = temperature**2 * (p * (p / q).log()).sum(1).mean()
        torch.testing.assert_close(distillation_loss(student, teacher, temperature), expected)
    assert distillation_loss(student, student, 2.0).item() == pytest.approx(0.0, abs=1e-12)
    # At a high temperature the gradient is that of half the squared distance of centred logits, over the classes.
    (found,) = torch.autograd.grad(distillation_loss(student, teacher.detach(), 1e4), student)
    difference = (student - student.mean(1, keepdim=True)) - (teacher - teacher.mean(1, keepdim=True))
    torch.testing.assert_close(found, difference.detach() / 4 / 6, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"mixup": 0.7}, {"label_smoothing": 0.1}], ids=["plain", "mixup", "smoothed"])
def test_a_step_learns_from_both(options, tiny, teacher):
    task = make(tiny, teacher=teacher, kd_weight=0.3, kd_temperature=2.0, **options)
    plain = make(tiny, **options)
    batch = task.loader.batch(0)
    saved = checkpoint.find(teacher, print).tensors
    network = make(tiny).model.eval()
    network.load_state_dict({n.removeprefix("ema."): t for n, t in saved.items() if n.startswith("ema.")})
    with torch.no_grad():
        wanted = network(batch.images)
    plain.place(0)
    logits = plain.model(batch.images)
    expected = 0.7 * plain._loss(logits, batch) + 0.3 * distillation_loss(logits, wanted, 2.0)
    task.train_step(0)
    assert task.loss_sum.item() / 16 == pytest.approx(expected.item(), rel=1e-5)


def test_the_student_comes_to_agree_with_its_teacher_whatever_the_labels(tiny, teacher):
    task = make(tiny, teacher=teacher, kd_weight=1.0, steps=60, lr=0.1, crop_pad=0, seed=8)
    digest = task.teacher.digest
    for step in range(60):
        task.train_step(step)
    images = torch.cat([task.loader.batch(step).images for step in range(6)])
    agreement = (task.model.eval()(images).argmax(1) == task.teacher.logits(images).argmax(1)).float().mean()
    assert agreement > 0.75
    after = {f"model.{name}": tensor for name, tensor in task.teacher._network.state_dict().items()}
    assert checkpoint.state_sha256(after) == digest


def test_continuing_is_bit_exact_and_needs_the_same_teacher(tiny, teacher, tmp_path):
    whole, first = (make(tiny, teacher=teacher) for _ in range(2))
    for step in range(4):
        whole.train_step(step)
    for step in range(2):
        first.train_step(step)
    saved = checkpoint.load(checkpoint.save(tmp_path / "run", 2, *first.state()))
    moved = shutil.copytree(teacher, tmp_path / "moved")
    second = make(tiny, teacher=str(moved))
    second.load_state(saved)
    for step in range(2, 4):
        second.train_step(step)
    assert everything(second) == everything(whole)
    for other in (save(tiny, tmp_path / "other", seed=4), None):
        with pytest.raises(checkpoint.CheckpointError, match="had a teacher of SHA-256 .*; pass the same one"):
            make(tiny, teacher=other).load_state(saved)


def test_the_teachers_part_of_a_step_can_be_captured(tiny, teacher):
    task = make(tiny, teacher=teacher)
    task.feed = Feed(torch.device("cpu"), static=True)
    for step in range(2):
        task.place(step)
        with NothingFromTheHost():
            task.compute()


CROPS = [{"hflip": "alternating"}, {"hflip": "random", "crop_mode": "zero"}, {"hflip": "off", "crop_pad": 1}]


@pytest.mark.parametrize("options", CROPS, ids=lambda options: options["hflip"])
def test_views_by_number_are_those_that_are_drawn(options, tiny):
    loader = make(tiny, **options).loader
    for step in (0, 9):
        index, view = loader.views_of(step)
        batch = loader.batch(step)
        assert torch.equal(loader.view_images(index, view), batch.images)
        assert torch.equal(loader._labels[index], batch.labels)
        assert 0 <= int(view.min()) and int(view.max()) < loader.views
    assert loader.views == (2 * loader.augmentation.crop_pad + 1) ** 2 * (1 if options["hflip"] == "off" else 2)


def test_kept_answers_are_the_teachers_and_are_computed_once(tiny, teacher, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("FASTCIFAR_CACHE", str(tmp_path))
    cached = make(tiny, teacher=teacher, kd_cache=True, crop_pad=1)
    assert "computing the teacher's answers to 100 × 18 views" in capsys.readouterr().out
    for step in range(3):
        wanted = cached.teacher.logits(cached.loader.batch(step).images)
        torch.testing.assert_close(cached.answers.of_step(step).float(), wanted, rtol=2e-3, atol=2e-3)
        cached.train_step(step)
    # Of an interrupted computation only the rest is done, with the same result.
    content = cached.answers.path.read_bytes()
    damaged = numpy.fromfile(cached.answers.path, numpy.float16).reshape(100, -1)
    damaged[64:] = 0
    damaged.tofile(cached.answers.path)
    cached.answers._progress.write_text("66")
    asked = []
    original = Teacher.logits

    def logits(self, images):
        asked.append(len(images))
        return original(self, images)

    monkeypatch.setattr(Teacher, "logits", logits)
    again = make(tiny, teacher=teacher, kd_cache=True, crop_pad=1)
    assert sum(asked) == 36 * 18 and again.answers.path.read_bytes() == content
    for step in range(3):
        again.train_step(step)
    assert sum(asked) == 36 * 18 and everything(again) == everything(cached)


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_file_of_answers_has_its_place_on_the_disk(tmp_path):
    answers._reserve(tmp_path / "file", 3_000_000)
    status = (tmp_path / "file").stat()
    assert status.st_size == 3_000_000 and status.st_blocks * 512 >= 3_000_000


def test_the_best_preset_by_the_command_line(place, teacher, capsys):
    source = write_tiny(place / "tiny.npz")
    command = ["--preset", "best", "--dataset", source, "--device", "cpu", "-b", 16, "--model-option", "width=0.25"]
    assert status_of([*command, "--steps", 3, "--teacher", teacher, "--output", "run"]) == 0
    assert "test_accuracy_tta" in result_of(capsys)
    assert status_of(["--resume", "run", "--eval-only"]) == 0
    capsys.readouterr()
    for arguments, words in (
        ([], "--preset best learns from a teacher: give --teacher RUN"),
        (["--teacher", "absent"], "there is no absent"),
        (["--teacher", teacher, "--kd-weight", 1.5], "--kd-weight must be in [0, 1], got 1.5"),
        (["--teacher", teacher, "--kd-temperature", 0], "--kd-temperature must be > 0, got 0.0"),
        (["--teacher", teacher, "--kd-cache", "--cutout", 3], "knows crops and flips alone, and --cutout is 3"),
        (["--teacher", teacher, "--dataset", write_tiny(place / "o.npz", classes=3)], "knows 5 classes, npz:"),
    ):
        assert status_of([*command, "--steps", 3, *arguments]) == 2
        message = capsys.readouterr().err
        assert words in message and len(message.splitlines()) == 1


def test_a_gan_teaches_nothing(place, tiny, capsys):
    source = write_tiny(place / "tiny.npz")
    checkpoint.save(place / "gan", 1, {}, {"config": {"model": "aw_sngan"}})
    assert status_of(["--dataset", source, "--steps", 2, "--teacher", "gan"]) == 2
    assert "holds the GAN aw_sngan; --teacher needs a classifier's run" in capsys.readouterr().err
    assert status_of(["--dataset", source, "--model", "aw_sngan", "--steps", 2, "--teacher", "gan"]) == 2
    assert "--teacher is for classifiers, aw_sngan is a GAN" in capsys.readouterr().err


def test_a_teacher_sees_images_as_it_was_trained_on_them(tiny, teacher):
    """A student on other images is normalised by their moments; the teacher's answers do not depend on them."""
    other = tiny.normalised_as((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    found = []
    for dataset in (tiny, other):
        pixels = torch.from_numpy(tiny.test_images).permute(0, 3, 1, 2) / 255
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (dataset.mean, dataset.std))
        asked = Teacher(teacher, dataset, torch.device("cpu"), torch.float32, "reference")
        found.append(asked.logits((pixels - mean) / std))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)
