"""Classification, step by step: bit-exact continuation, averages, ranks, non-finite losses."""

import dataclasses
import math

import pytest
import torch
from training_case import write_tiny

from fastcifar import data
from fastcifar.training import checkpoint, distributed, loop, recipe, run_folder
from fastcifar.training.classify import Classification
from fastcifar.training.ema import WeightAverage
from fastcifar.training.evaluation import tta_logits
from fastcifar.training.progress import Silent

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return data.load_dataset(write_tiny(tmp_path_factory.mktemp("data") / "tiny.npz"))


def make(tiny, processes=None, **options):
    settings = {"model_options": {"width": 0.25}, "amp_dtype": "fp32", "batch_size": 16, "steps": 8, "crop_pad": 2}
    if options.get("model", "ds_resnet") != "ds_resnet":
        settings.pop("model_options")
    chosen = recipe.with_budget(recipe.resolve({**settings, **options}, has_gpu=False), len(tiny.train_images))
    return Classification(chosen, tiny, CPU, processes or distributed.Processes())


def everything(task):
    return checkpoint.state_sha256(task.state()[0]), task.state()[1]


VARIANTS = {
    "sgd": {"opt": "sgd"},
    "adam": {"opt": "adam", "lr": 1e-3},
    "adamw with average": {"opt": "adamw", "lr": 1e-3, "model_ema_decay": 0.9},
    "clipped, smoothed": {"clip_grad": 0.5, "label_smoothing": 0.1, "sched": "onecycle"},
    "mixup": {"mixup": 0.5, "hflip": "random"},
    "cutmix, jitter": {"cutmix": 1.0, "color_jitter": 0.2, "cutout": 3},
    "bf16": {"amp_dtype": "bf16"},
    "fp16": {"amp_dtype": "fp16"},
    "dropout": {"model": "modify_resnet", "model_options": {"widths": (4, 4, 4, 4)}, "batch_size": 4},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
def test_continuing_is_bit_exact(options, tiny, tmp_path):
    whole = make(tiny, **options)
    for step in range(6):
        whole.train_step(step)
    first = make(tiny, **options)
    for step in range(3):
        first.train_step(step)
    tensors, state = first.state()
    saved = checkpoint.load(checkpoint.save(tmp_path, 3, tensors, state))
    second = make(tiny, **{**options, "seed": 0})
    torch.manual_seed(999)
    second.load_state(saved)
    for step in range(3, 6):
        second.train_step(step)
    assert everything(second) == everything(whole)
    assert whole.take_averages() == second.take_averages()


def test_two_runs_are_equal_and_seeds_differ(tiny):
    def trained(seed):
        task = make(tiny, seed=seed)
        for step in range(3):
            task.train_step(step)
        return everything(task)

    assert trained(0) == trained(0) != trained(1)


def test_training_learns(tiny):
    task = make(tiny, steps=60, lr=0.1, crop_pad=0)
    for step in range(60):
        task.train_step(step)
    assert task.evaluate("train").accuracy > 80
    assert task.evaluate("test").accuracy > 60


def test_a_checkpoint_of_another_recipe_is_refused(tiny, tmp_path):
    task = make(tiny, opt="sgd")
    task.train_step(0)
    saved = checkpoint.load(checkpoint.save(tmp_path, 1, *task.state()))
    other = make(tiny, model_ema_decay=0.9)
    with pytest.raises(checkpoint.CheckpointError, match="lacks 'ema"):
        other.load_state(saved)


def test_average_follows_the_definition(tiny):
    task = make(tiny)
    average = WeightAverage(task.model, 0.5)
    expected = {name: tensor.double().clone() for name, tensor in average.model.state_dict().items()}
    for step in range(4):
        task.train_step(step)
        # Every second time as a captured step does it.
        average.update(torch.tensor(average.share(step)) if step % 2 else average.share(step))
        decay = min(0.5, (1 + step) / (10 + step))
        for name, tensor in task.model.state_dict().items():
            value = tensor.double()
            expected[name] = value if not tensor.is_floating_point() else decay * expected[name] + (1 - decay) * value
    for name, tensor in average.model.state_dict().items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-6)
    assert not average.model.training and not any(p.requires_grad for p in average.model.parameters())


def test_decay_spares_norms_and_biases(tiny):
    groups = make(tiny).optimiser.param_groups
    assert groups[0]["weight_decay"] > 0 and all(p.dim() > 1 for p in groups[0]["params"])
    assert groups[1]["weight_decay"] == 0 and all(p.dim() <= 1 for p in groups[1]["params"])


def test_mixed_loss_is_the_weighted_sum(tiny):
    task = make(tiny, mixup=0.7, label_smoothing=0.1)
    batch = task.loader.batch(0)
    logits = torch.randn(16, 5, dtype=torch.float64)
    target = torch.zeros(16, 5, dtype=torch.float64)
    for i in range(16):
        target[i, batch.labels[i]] += 1 - batch.partner_weight[i].double()
        target[i, batch.partner_labels[i]] += batch.partner_weight[i].double()
    target = 0.9 * target + 0.1 / 5
    expected = -(target * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(task._loss(logits, batch), expected, rtol=1e-9, atol=0)


def poison(task, step):
    """Lets the loss of one step be NaN."""
    original = task.loader.render

    def render(plan):
        made = original(plan)
        return made._replace(images=made.images * float("nan")) if int(plan.step) == step else made

    task.loader.render = render


@pytest.mark.parametrize("amp_dtype", ["fp32", "fp16"])
def test_a_bad_gradient_changes_no_weight(tiny, amp_dtype):
    task = make(tiny, amp_dtype=amp_dtype)
    poison(task, 1)
    task.train_step(0)
    parameters = [p.detach().clone() for p in task.model.parameters()]
    task.train_step(1)
    assert all(torch.equal(a, b) for a, b in zip(parameters, task.model.parameters(), strict=True))
    assert (int(task.update.bad_steps), int(task.update.first_bad)) == (1, 1)


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_nan_policy(tiny, tmp_path, policy):
    task = make(tiny, nan=policy, steps=8)
    poison(task, 5)
    folder = run_folder.RunFolder(tmp_path)
    train_loop = loop.Loop(task, folder, Silent(8), distributed.Processes())
    if policy == "stop":
        with pytest.raises(loop.NotFinite, match=r"at step 6 .* --clip-grad 1"):
            train_loop.run()
    else:
        train_loop.run()
        assert train_loop.step == 8 and int(task.update.bad_steps) == 1
    assert all(torch.isfinite(p).all() for p in task.model.parameters())


def test_a_full_disk_is_a_warning_until_the_last_save(tiny, tmp_path, monkeypatch):
    task = make(tiny, save_every=2)
    folder = run_folder.RunFolder(tmp_path)
    original, told = checkpoint.save, []

    def save(place, step, tensors, state):
        if step >= 4:
            raise OSError(28, "No space left on device")
        return original(place, step, tensors, state)

    monkeypatch.setattr(checkpoint, "save", save)
    progress = Silent(8)
    progress.message = told.append
    with pytest.raises(loop.SaveFailed, match="No space left"):
        loop.Loop(task, folder, progress, distributed.Processes()).run()
    warnings = [text for text in told if "WARNING" in text]
    assert len(warnings) == 2 and "no checkpoint at step 4" in warnings[0]
    assert checkpoint.find(tmp_path, told.append).step == 2


def test_rows_after_the_resumed_step_are_dropped(tmp_path):
    folder = run_folder.RunFolder(tmp_path)
    for step in (1, 2, 3):
        folder.add({"step": step, "train_loss": math.inf if step == 2 else 0.5})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "tra')
    folder.close()
    again = run_folder.RunFolder(tmp_path, step=2)
    again.add({"step": 3, "train_loss": 0.25})
    assert [(row["step"], row["train_loss"]) for row in again.rows] == [(1, 0.5), (2, None), (3, 0.25)]
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert len(lines) == 4 and lines[0].startswith("step,") and lines[3].startswith("3,")


def test_tta_of_a_translation_invariant_model_is_the_model():
    class Mean(torch.nn.Module):
        def forward(self, x):
            return x.mean((2, 3))

    images = torch.rand(4, 1, 1, 3).expand(4, 8, 8, 3).permute(0, 3, 1, 2)
    torch.testing.assert_close(tta_logits(Mean(), images), Mean()(images))


def test_recipe_is_json(tiny):
    import json

    assert json.loads(json.dumps(dataclasses.asdict(make(tiny).recipe)))["steps"] == 8
