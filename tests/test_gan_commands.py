"""Training, evaluating and generating with GANs as a user does."""

import dataclasses
import json

import numpy
import pytest
import torch
from training_case import result_of, status_of, write_tiny

from fastcifar import data, evaluate, generate, metrics
from fastcifar.training import checkpoint, gan, judging, progress, recipe, run_folder, sampling
from fastcifar.training import networks as gan_networks

CPU = torch.device("cpu")


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


def load(run):
    saved = checkpoint.find(run / "gan", notify=print)
    return gan.load_gan(saved, recipe.of_checkpoint(saved))


def test_interpolations_begin_and_end_at_their_classes(run):
    networks, names = load(run)
    options = generate._parser().parse_args(
        ["--checkpoint", "x", "--interpolate", f"{names[1]}:{names[3]}", "--seeds", "5,6", "--frames", "4"]
    )
    frames = generate._interpolation(networks, names, options, CPU)
    networks, _ = load(run)
    for frame, seed, label in ((frames[0], 5, 1), (frames[-1], 6, 3)):
        latents = generate._latent(networks, seed)[None]
        expected = sampling.to_uint8(sampling.generate(networks.generator, latents, torch.tensor([label])))[0]
        assert numpy.abs(frame.astype(int) - expected).max() <= 1


BAD_GENERATE = {
    "unknown class": (["--classes", "poppi"], "class"),
    "no interpolation": (["--interpolate", "poppy"], "poppy:apple"),
    "bad seeds": (["--seeds", "a-b"], "--seeds must be numbers"),
    "truncation": (["--truncation", "2"], "--truncation must lie in"),
    "format": (["--count", "3", "--format", "gif"], "--format"),
    "no images": (["--count", "0"], "--count must be ≥ 1"),
    "a set of some classes": (["--count", "3", "--classes", "class 1"], "--count draws of all classes"),
    "a truncated set": (["--count", "3", "--truncation", "0.5"], "--count draws of all classes"),
}


@pytest.mark.parametrize(("arguments", "words"), BAD_GENERATE.values(), ids=BAD_GENERATE.keys())
def test_generate_refuses_in_one_line(arguments, words, run, tmp_path, capsys):
    assert drawn(run, "--output", tmp_path, *arguments) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and words in error


def evaluated(run, *arguments, of="gan"):
    common = ["--checkpoint", run / of, "--output", run / "evaluated", "--samples", "30"]
    return status_of([*common, *arguments], evaluate.main, "python -m fastcifar.evaluate")


def test_evaluate_measures_samples(run, capsys):
    wanted = ["--metrics", "fd,kid,prdc,cas", "--classifier", run / "classifier", "--cas-steps", "2"]
    assert evaluated(run, *wanted) == 0
    out = capsys.readouterr().out
    assert "30 images are few for a Fréchet distance" in out
    result = json.loads(out.splitlines()[-1])
    assert json.loads((run / "evaluated" / "evaluation.json").read_text()) == result
    assert {"fd", "kid", "kid_deviation", "precision", "recall", "density", "coverage", "cas"} <= set(result)
    assert result["extractor"] == "classifier ds_resnet" and len(result["extractor_sha256"]) == 64
    assert result["reference"] == "40 test images" and result["samples"] == 30 and result["resize"] == "none"
    assert 0 <= result["cas"] <= 100 and "2 steps of 128, trained on 30 samples" in result["cas_classifier"]
    # As in training, with other samples only where the seed is another.
    assert evaluated(run, "--metrics", "fd", "--classifier", run / "classifier") == 0
    assert result_of(capsys)["fd"] == result["fd"]
    assert evaluated(run, "--metrics", "fd", "--classifier", run / "classifier", "--seed", "1") == 0
    assert result_of(capsys)["fd"] != result["fd"]


def test_figures_of_one_run_are_of_one_network(run, tmp_path, capsys):
    source = f"npz:{run}/tiny.npz"
    other = ["--dataset", source, "--steps", "1", "-b", "8", "--seed", "1", "--model-option", "width=0.25"]
    assert status_of([*other, "--output", tmp_path / "other"]) == 0
    again = ["--resume", run / "gan", "--classifier", tmp_path / "other", "--dataset", source]
    assert status_of(again) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "were judged by a network of SHA-256" in error
    assert status_of([*again, "--eval-only"]) == 0


BAD_EVALUATE = {
    "unknown metric": (["--metrics", "fdd"], "choose from: fd, fid, kid, prdc, lpips-nn, cas"),
    "fid of a classifier": (["--metrics", "fid", "--classifier", "absent"], "ask for fd"),
    "absent classifier": (["--metrics", "fd", "--classifier", "absent"], "there is no absent"),
    "one sample": (["--samples", "1"], "--samples must be ≥ 2"),
    "no steps": (["--metrics", "cas", "--cas-steps", "0"], "--cas-steps must be ≥ 1"),
    "copies": (["--tta"], "--tta is for classifiers"),
}


@pytest.mark.parametrize(("arguments", "words"), BAD_EVALUATE.values(), ids=BAD_EVALUATE.keys())
def test_evaluate_refuses_in_one_line(arguments, words, run, capsys):
    assert evaluated(run, *arguments) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and words in error


def test_a_classifier_has_no_metrics_of_samples(run, capsys):
    assert evaluated(run, "--metrics", "fd", of="classifier") == 2
    assert "--metrics is for GANs" in capsys.readouterr().err


def test_generate_refuses_a_classifier(run, capsys):
    assert status_of(["--checkpoint", run / "classifier"], generate.main, "python -m fastcifar.generate") == 2
    assert "holds the classifier ds_resnet" in capsys.readouterr().err


BAD = {
    "classifier's option": ["--model", "aw_sngan", "--mixup", "1"],
    "test-time augmentation": ["--model", "dcgan", "--tta"],
    "unknown loss": ["--model", "aw_sngan", "--loss", "wgan"],
    "unknown policy": ["--model", "aw_sngan", "--diffaugment", "colour"],
    "unknown metric": ["--model", "aw_sngan", "--metrics", "fdd"],
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


def test_nearest_training_images_are_measured_and_drawn(run, lpips_weights, capsys):
    from PIL import Image

    assert evaluated(run, "--metrics", "lpips-nn", "--lpips-weights", lpips_weights) == 0
    result = result_of(capsys)
    assert result["lpips_samples"] == 30 and result["lpips_reference"] == "100 train images"
    assert result["lpips_nn"] > result["lpips_nn_of_test_images"] > 0  # test and training images are much alike here
    assert Image.open(run / "evaluated" / "nearest.png").size == (6 * 34 * 2, 16 * 34 * 2)


def test_absent_weights_are_one_line(run, tmp_path, capsys):
    pytest.importorskip("pytorch_fid.inception", exc_type=Exception)
    absent = tmp_path / "absent.pth"
    assert evaluated(run, "--metrics", "fid", "--inception-weights", absent) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and str(absent) in error and "--classifier RUN" in error


def test_a_figure_of_every_metric_has_its_column_and_is_shown():
    generator = numpy.random.default_rng(0)
    batches = [generator.integers(0, 256, (40, 4, 4, 3), dtype=numpy.uint8) for _ in range(2)]

    class Pixels:
        dimension, device = 48, CPU

        def __call__(self, images):
            return torch.from_numpy(images.reshape(len(images), -1)).float()

    found = metrics.compare(Pixels(), metrics.Reference(Pixels(), batches[:1]), batches[1:], metrics.METRICS)
    assert set(found) <= set(run_folder.GAN_COLUMNS) and {"fd", "fid", "kid", "precision"} <= set(found)
    assert "FID 3.25" in progress.format_row({"step": 1, "fid": 3.25}, 2)


def test_few_images_are_named_for_an_fid_too():
    judge = judging.Judge.__new__(judging.Judge)
    judge.count, judge.wanted, judge.extractor = 30, ("fid",), type("Extractor", (), {"dimension": 8})
    statistics = type("Statistics", (), {"count": 40})
    judge.reference = type("Reference", (), {"statistics": statistics, "features": [0] * 8, "floor": lambda count: 1.0})
    assert "30 images are few" in judge.warnings()[0]


def test_cas_without_classes_is_refused_before_any_work(run, tmp_path, capsys):
    plain = ["--model", "aw_sngan", "--unconditional", "--model-option", "width=4", "--model-option"]
    plain += ["discriminator_width=2", "--dataset", f"npz:{run}/tiny.npz", "--steps", "1", "-b", "8"]
    assert status_of([*plain, "--amp-dtype", "fp32", "--output", tmp_path / "plain"]) == 0
    arguments = ["--checkpoint", tmp_path / "plain", "--metrics", "fid,lpips-nn,cas"]
    assert status_of(arguments, evaluate.main, "python -m fastcifar.evaluate") == 2
    assert "cas needs a GAN that was trained with classes" in capsys.readouterr().err


def test_first_weights_of_a_gan_are_its_averaged_generator_and_its_discriminator(run, tmp_path, capsys):
    options = ["--model", "aw_sngan", "--model-option", "width=4", "--model-option", "discriminator_width=2"]
    options += ["--dataset", f"npz:{run}/tiny.npz", "-b", "8", "--amp-dtype", "fp32", "--steps", "1"]
    averaged = [*options, "--model-ema-decay", "0.5", "--output", tmp_path / "averaged"]
    assert status_of(averaged) == 0
    saved = checkpoint.find(tmp_path / "averaged", print)
    tensors = gan_networks.network_of(saved)
    assert any(name.startswith("discriminator.") for name in tensors)
    for name, tensor in saved.tensors.items():
        if name.startswith("ema."):
            assert torch.equal(tensors[name.replace("ema.", "generator.", 1)], tensor)
    assert status_of([*options, "--init-weights", tmp_path / "averaged", "--output", tmp_path / "on"]) == 0


def test_a_judge_sees_images_as_it_was_trained_on_them(run, monkeypatch, tmp_path):
    """Real images of a set with other training images are no further from themselves."""
    monkeypatch.setenv("FASTCIFAR_CACHE", str(tmp_path))
    own = data.load_dataset(f"npz:{run}/tiny.npz")
    other = dataclasses.replace(own, train_images=own.train_images // 2)
    assert own.mean != other.mean
    features = [judging.classifier_features(str(run / "classifier"), d, CPU)(own.test_images) for d in (own, other)]
    assert torch.equal(*features)


def test_too_few_samples_for_neighbours_are_refused_before_training(run, tmp_path, capsys):
    arguments = ["--model", "aw_sngan", "--dataset", f"npz:{run}/tiny.npz", "--classifier", run / "classifier"]
    arguments += ["--metrics", "prdc", "--metric-samples", "5", "--output", tmp_path / "run"]
    assert status_of(arguments) == 2
    assert "prdc needs more than 5 samples" in capsys.readouterr().err
