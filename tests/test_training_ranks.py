"""Training on 2 and 4 ranks is training in one process on the whole batch: to rounding in float64, and within the error
that float32 has in one process."""

import contextlib
import dataclasses
from unittest import mock

import numpy as np
import oracle
import pytest
import torch
from distributed_case import run_ranks
from training_case import write_tiny

from fastcifar import data, recipe_flags, train
from fastcifar.training import adversarial, classify, distributed, recipe, sampling

CPU = torch.device("cpu")
AW_SNGAN = {"width": 4, "discriminator_width": 2, "latent_dim": 8}
GAN = {"model": "aw_sngan", "model_options": AW_SNGAN, "batch_size": 16, "steps": 8, "lr": 0.01}
PLAIN = {"model_options": {"width": 0.25}, "batch_size": 16, "steps": 8, "crop_pad": 2, "lr": 0.05}
TASKS = {
    "classifier": {**PLAIN, "mixup": 0.5},
    "classifier, clipped, averaged": {**PLAIN, "opt": "adamw", "lr": 1e-3, "clip_grad": 0.1, "model_ema_decay": 0.9},
    "aw_sngan": {**GAN, "n_dis": 2, "diffaugment": "color,translation,cutout", "model_ema_decay": 0.9},
    "aw_sngan, hinge, groups": {**GAN, "loss": "hinge", "model_options": {**AW_SNGAN, "minibatch_deviation": True}},
    "dcgan": {**GAN, "model": "dcgan", "model_options": {"width": 2, "latent_dim": 8}},
}
LOCAL = {"opt": "sgd", "momentum": 0.0, "mixup": 0.0}
IN_FLOAT32 = ("classifier", "aw_sngan")


@contextlib.contextmanager
def double_precision():
    """Training in float64: what it makes float32 stays float64, from the same weights and latents."""
    build_model, build_gan, draw = classify.build_model, adversarial.build_gan, sampling.draw

    def drawn(*arguments):
        found = draw(*arguments)
        return found._replace(latents=found.latents.double())

    with (
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
        mock.patch.object(classify, "build_model", lambda *a: build_model(*a).double()),
        mock.patch.object(adversarial, "build_gan", lambda *a: build_gan(*a).double()),
        mock.patch.object(sampling, "draw", drawn),
    ):
        yield


def make(dataset, rank=0, world_size=1, *, double=False, **options):
    settings = {"amp_dtype": "fp32", "impl": "reference" if double else "auto", **options}
    chosen = recipe.with_budget(recipe.resolve(settings, has_gpu=False), len(dataset.train_images))
    kind = adversarial.Adversarial if chosen.model in ("aw_sngan", "dcgan") else classify.Classification
    task = kind(chosen, dataset, CPU, distributed.Processes(rank, world_size, rank))
    if double:
        task.loader.dtype = torch.float64
    return task


def tensors_of(task):
    return {name: tensor.detach().numpy().copy() for name, tensor in task.network_tensors().items()}


def trained(task, steps=2):
    """Averages, and all tensors before and after some steps."""
    before = tensors_of(task)
    for step in range(steps):
        task.train_step(step)
    averages = task.take_averages()
    averages.pop("deviation", None)  # within each process's own images
    return averages, before, tensors_of(task)


def dataset_of(name, sources):
    return sources["gan" if "gan" in name else "classifier"]


def train_all(rank, world_size, paths):
    sources, results = {name: data.load_dataset(path) for name, path in paths.items()}, {}
    with double_precision():
        for name, options in TASKS.items():
            results[name, "float64"] = trained(
                make(dataset_of(name, sources), rank, world_size, double=True, **options)
            )
    for name in IN_FLOAT32:
        results[name, "float32"] = trained(make(dataset_of(name, sources), rank, world_size, **TASKS[name]))
        results[name, "sharded"] = trained(
            make(dataset_of(name, sources), rank, world_size, data_placement="sharded", **TASKS[name])
        )
        results[name, "local"] = trained(local_task(name, sources, rank, world_size), 1)
        if world_size == 1:
            results[name, "halves"] = [trained(local_task(name, sources, half=half), 1) for half in range(2)]
    return results


def local_task(name, sources, rank=0, world_size=1, half=None):
    """With statistics of each process's own batch; `half` gives a single process that part of the batch."""
    options = {**TASKS[name], **LOCAL} if name == "classifier" else {**TASKS[name], "n_dis": 1}
    task = make(dataset_of(name, sources), rank, world_size, sync_bn=False, **options)
    if half is not None:
        task.loader = as_half(task, half, task._build_loader)()
        task.place = as_half(task, half, task.place)
    return task


def as_half(task, half, function):
    """The function of a single process's task as rank `half` of two would run it."""

    def call(*arguments):
        task.processes = distributed.Processes(half, 2, half)
        try:
            return function(*arguments)
        finally:
            task.processes = distributed.Processes()

    return call


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return {name: write_tiny(folder / f"{name}.npz", size=size) for name, size in (("classifier", 12), ("gan", 32))}


@pytest.fixture(scope="module")
def results(paths):
    """By number of ranks, rank, (task, precision): averages and tensors."""
    return {count: run_ranks(train_all, count, paths) for count in (1, 2, 4)}


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("name", IN_FLOAT32)
def test_sharded_images_give_the_same_training(name, count, results):
    for rank in results[count]:
        for key, tensor in rank[name, "sharded"][2].items():
            assert (tensor == rank[name, "float32"][2][key]).all(), key


CASES = [*((name, "float64") for name in TASKS), *((name, "float32") for name in IN_FLOAT32)]


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("case", CASES, ids=[", ".join(case) for case in CASES])
def test_all_ranks_have_the_same_weights(case, count, results):
    averages, _, tensors = results[count][0][case]
    for rank in results[count][1:]:
        assert rank[case][0] == averages
        for key, tensor in rank[case][2].items():
            assert (tensor == tensors[key]).all(), key


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("name", TASKS)
def test_float64_is_that_of_one_process_to_rounding(name, count, results):
    averages, _, tensors = results[count][0][name, "float64"]
    expected_averages, before, expected = results[1][0][name, "float64"]
    assert averages == pytest.approx(expected_averages, rel=1e-6, abs=1e-6)
    for key, tensor in tensors.items():
        # Adam divides by gradients near zero; float32 would be off by 1e-4 of the way.
        distance = abs(expected[key] - before[key]).max()
        assert distance > 0 and abs(tensor - expected[key]).max() <= 1e-8 * distance, key


@pytest.mark.parametrize("count", [2, 4])
def test_float32_errs_no_more_than_in_one_process(count, results):
    found = results[count][0]["classifier", "float32"][2]
    low, exact = (results[1][0]["classifier", precision][2] for precision in ("float32", "float64"))
    for key in found:
        oracle.within(*(torch.from_numpy(t[key]).double() for t in (found, exact, low)), torch.float32, key)


@pytest.mark.parametrize("name", IN_FLOAT32)
def test_local_statistics_are_averaged_after_the_step(name, results):
    """The first step of SGD is linear in the gradients, and the statistics are: two processes give the mean of their
    halves. Adam's is not, but the generator's statistics precede it."""
    first, second = results[2]
    halves = results[1][0][name, "halves"]
    for key, tensor in first[name, "local"][2].items():
        assert (tensor == second[name, "local"][2][key]).all(), key
        if name == "classifier" or key.startswith("model.generator") and "running" in key:
            one, other = (half[2][key] for half in halves)
            np.testing.assert_allclose(tensor, (one + other) / 2, rtol=1e-5, atol=1e-6, err_msg=key)
            assert "running" not in key or (one != other).any()


def test_options_of_several_processes_are_flags():
    parsed = train._parser().parse_args(["--no-sync-bn", "--data-placement", "sharded"])
    chosen = recipe.resolve(recipe_flags.given(parsed), has_gpu=False)
    assert not chosen.sync_bn and chosen.data_placement == "sharded"
    assert recipe.resolve({}, has_gpu=False).sync_bn
    # Where the images lie changes nothing of the result, local statistics do.
    fields = [dataclasses.asdict(recipe.resolve(given, has_gpu=False)) for given in ({}, {"data_placement": "sharded"})]
    assert recipe.differences(*fields) == []
    assert recipe.differences(fields[0], {**fields[0], "sync_bn": False}) == ["sync_bn: True → False"]
