"""Presets, configuration files and flags become one checked recipe."""

import dataclasses

import pytest

from fastcifar import models
from fastcifar.training import recipe
from fastcifar.training.options import Recipe, options


def resolve(config=None, has_gpu=False, **flags):
    return recipe.resolve(flags, config, has_gpu=has_gpu)


def test_auto_is_fast_with_a_gpu_and_demo_without():
    assert resolve().preset == "demo"
    assert resolve(has_gpu=True).preset == "fast"


def test_seed_is_the_published_recipe():
    seed = resolve(preset="seed")
    assert (seed.opt, seed.lr, seed.sched, seed.batch_size, seed.steps) == ("adam", 1e-3, "constant", 512, 10_000)
    assert (seed.crop_pad, seed.hflip, seed.weight_decay) == (4, "random", 0.0) and seed.color_jitter > 0


def test_presets_that_name_their_network():
    transfer = recipe.with_budget(resolve(model="xception"), images=50_000)
    assert (transfer.preset, transfer.backbone, transfer.steps) == ("xception-transfer", "imagenet", 17_969)
    assert (transfer.lr, transfer.phases) == (2e-4, "20:1:frozen,13:0.025,13:0.01")
    cifar10 = resolve(preset="resnet_cifar10")
    assert (cifar10.model, cifar10.dataset, cifar10.epochs, cifar10.steps) == ("resnet_cifar10", "cifar10", 30, None)
    speed = resolve(preset="cifar10-speed", dataset="auto", steps=5)
    assert (speed.hflip, speed.tta, speed.dataset, speed.steps) == ("alternating", True, "auto", 5)
    wide = recipe.with_budget(resolve(model="modify_resnet", preset="seed"), images=50_000)
    assert (wide.opt, wide.phases, wide.steps) == ("adam", "16:1,6:0.1,4:0.01", 78 * 50_000 // 128 + 1)
    assert models.model_options("modify_resnet")["dropout"] == models.model_options("xception")["dropout"] == 0.5


def test_the_command_line_offers_the_presets_that_there_are():
    (preset,) = (option for option in options() if option.name == "preset")
    assert preset.metadata["choices"] == ("auto", *recipe.PRESETS)


def test_first_weights_replace_the_presets_backbone():
    assert resolve(model="xception", init_weights="run").backbone is None


def test_flags_win_over_file_and_file_over_preset():
    chosen = resolve({"lr": 0.2, "momentum": 0.8}, preset="fast", momentum=0.7)
    assert (chosen.lr, chosen.momentum, chosen.steps) == (0.2, 0.7, 10_000)


def test_epochs_replace_the_presets_steps():
    chosen = recipe.with_budget(resolve(epochs=2.5, batch_size=100), images=1_000)
    assert chosen.steps == 25 and chosen.epochs is None


def test_a_budget_flag_replaces_the_files_other_budget():
    assert resolve({"epochs": 3.0}, steps=7).steps == 7


def test_budget_fills_warm_up_and_evaluation():
    chosen = recipe.with_budget(resolve(steps=100), images=1_000)
    assert (chosen.warmup_steps, chosen.eval_every) == (20, 20)
    assert recipe.with_budget(resolve(steps=100, eval_every=0), images=1_000).eval_every == 100


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ({"model": "ds_resent"}, ["'ds_resent'", "did you mean 'ds_resnet'"]),
        ({"preset": "fats"}, ["'fats'", "'fast'"]),
        ({"lr": -1.0}, ["--lr", "-1.0", "≥ 0"]),
        ({"lr": float("nan")}, ["--lr", "nan"]),
        ({"batch_size": 0}, ["--batch-size", "0", "≥ 1"]),
        ({"batch_size": 1.5}, ["--batch-size", "whole number", "1.5"]),
        ({"steps": 5, "epochs": 1.0}, ["--steps 5", "--epochs 1.0", "exclude"]),
        ({"label_smoothing": 1.0}, ["--label-smoothing", "[0, 1)"]),
        ({"mixup": 0.2, "cutmix": 1.0}, ["--mixup", "--cutmix", "exclude"]),
        ({"eval_only": True}, ["--eval-only", "--resume"]),
        ({"resume": "run", "init_weights": "x"}, ["--resume", "--init-weights"]),
        ({"model": "aw_sngan", "compile": True}, ["--compile", "aw_sngan"]),
        ({"preset": "best"}, ["--preset best", "--teacher RUN", "--preset fast"]),
        ({"sched": "cosin"}, ["'cosin'", "'cosine'"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_options_are_named_with_their_values(flags, parts):
    with pytest.raises(ValueError) as error:
        resolve(**flags)
    assert all(part in str(error.value) for part in parts), str(error.value)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"n_dis": 5}, "--n-dis is for GANs .*, ds_resnet is a classifier"),
        ({"metrics": "fid"}, "--metrics is for GANs"),
        ({"metric_samples": 10}, "--metric-samples is for GANs"),
        ({"adversarial_eps": 0.1}, "--adversarial-eps does nothing without --adversarial"),
        ({"kd_weight": 0.5}, "--kd-weight does nothing without --teacher"),
        ({"model": "aw_sngan", "kd_weight": 0.5}, "--kd-weight does nothing without --teacher"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_flags_without_effect_are_refused(flags, words):
    chosen = resolve(**flags)
    with pytest.raises(ValueError, match=words):
        recipe.check_effect(flags, chosen)
    # Those of a checkpoint or a file, and those of a control beside its experiment, are not.
    recipe.check_effect({}, chosen)
    recipe.check_effect({"adversarial": "off", "adversarial_eps": 0.1, "teacher": None, "kd_weight": 0.5}, resolve())


def test_too_long_a_warm_up_is_refused():
    with pytest.raises(ValueError, match="--warmup-steps 30 exceeds the run's 20 steps"):
        recipe.with_budget(resolve(steps=20, warmup_steps=30), images=100)


def test_unknown_key_in_a_file_gets_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'weight_decay'"):
        resolve({"weight_decey": 0.1})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1\n- 2\n", "table of option names"),
        ("lr: [1, 2", "not valid YAML"),
        ("lr: !!python/object/apply:os.system ['true']", "not valid YAML"),
        ("1: 2", "table of option names"),
    ],
    ids=["list", "syntax", "python object", "number as a name"],
)
def test_bad_configuration_files(tmp_path, text, message):
    pytest.importorskip("yaml")
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        recipe.read_config(str(path))


def test_a_resolved_recipe_read_back_is_itself(tmp_path):
    pytest.importorskip("yaml")
    import json

    chosen = resolve(preset="seed", lr=0.5, model_options={"activation": "silu"})
    table = {key: value for key, value in dataclasses.asdict(chosen).items() if value is not None}
    path = tmp_path / "config.yaml"
    path.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in table.items()))
    assert recipe.resolve({}, recipe.read_config(str(path)), has_gpu=False) == chosen


def test_differences_name_what_decides_the_weights():
    old = dataclasses.asdict(Recipe())
    new = dataclasses.asdict(Recipe(lr=0.5, output="elsewhere", tta=True))
    assert recipe.differences(old, new) == ["lr: 0.4 → 0.5"]


def test_every_option_has_a_help_text():
    assert all(option.metadata["help"] for option in options())
    assert len(options()) > 35
