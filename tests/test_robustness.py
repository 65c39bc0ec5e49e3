"""Adversarial images, training on them, and accuracy under attack."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from training_case import TINY, result_of, status_of, write_tiny

from fastcifar import data, evaluate, models
from fastcifar.training import checkpoint, distributed, recipe, robustness
from fastcifar.training.classify import Classification

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("data") / "tiny.npz")


def pixels(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def normalised(values):
    return (values - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def test_a_linear_network_is_pushed_to_the_corner():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 5, 2))
    values = pixels(6, 3, 4, 5)
    start = torch.zeros_like(values)
    limits = robustness.bounds(0.1, 0.03, MEAN, STD)
    found = robustness.projected_gradient(model, normalised(values), lambda z: z[:, 1].sum(), limits, 5, start)
    sign = model[1].weight[1].detach().sign().view(3, 4, 5)
    # Four steps of 0.03 pass the radius of 0.1; pixels stay in [0, 1].
    torch.testing.assert_close(found, normalised((values + 0.1 * sign).clamp(0, 1)))
    short = robustness.projected_gradient(model, normalised(values), lambda z: z[:, 1].sum(), limits, 2, start)
    torch.testing.assert_close(short, normalised((values + 0.06 * sign).clamp(0, 1)))


@pytest.mark.parametrize("impl", ["reference", "auto"])
def test_an_attack_leaves_no_trace_and_keeps_its_bounds(impl):
    torch.manual_seed(0)
    model = models.create_model("ds_resnet", 5, width=0.25, impl=impl).train()
    model.stages[0].eval()
    model.head.fc.weight.requires_grad_(False)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    labels = torch.tensor([0, 1, 2, 3])
    values = pixels(4, 3, 12, 12)
    limits = robustness.bounds(8 / 255, 2 / 255, MEAN, STD)
    start = (2 * pixels(4, 3, 12, 12, seed=1) - 1) * limits.radius

    def loss(logits):
        return F.cross_entropy(logits, labels)

    found = robustness.projected_gradient(model, normalised(values), loss, limits, 4, start)
    assert [module.training for module in model.modules()] == modes
    assert not model.head.fc.weight.requires_grad and model.stem.conv.weight.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)
    moved = found * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    assert (moved - values).abs().max() <= 8 / 255 + 1e-6 and moved.min() >= -1e-6 and moved.max() <= 1 + 1e-6
    model.eval()
    assert loss(model(found)) > loss(model(normalised(values) + start)) and not found.requires_grad


def task(source, **options):
    dataset = data.load_dataset(source)
    flags = {"model_options": {"width": 0.25}, "batch_size": 8, "steps": 4, "amp_dtype": "fp32", "lr": 0.05}
    steps = {"adversarial_steps": 2} if "adversarial" in options else {}
    chosen = recipe.resolve({**flags, **steps, **options}, has_gpu=False)
    chosen = recipe.with_budget(chosen, len(dataset.train_images))
    return Classification(chosen, dataset, CPU, distributed.Processes())


@pytest.mark.parametrize("kind", ["pgd", "trades"])
def test_training_goes_on_bit_by_bit(source, tmp_path, kind):
    whole, first, second = (task(source, adversarial=kind) for _ in range(3))
    for step in range(4):
        whole.train_step(step)
    for step in range(2):
        first.train_step(step)
    second.load_state(checkpoint.load(checkpoint.save(tmp_path, 2, *first.state())))
    for step in range(2, 4):
        second.train_step(step)
    hashes = [checkpoint.state_sha256(t.state()[0]) for t in (whole, second)]
    assert hashes[0] == hashes[1]
    plain = task(source)
    for step in range(4):
        plain.train_step(step)
    assert checkpoint.state_sha256(plain.state()[0]) != hashes[0]


@pytest.mark.parametrize("kind", ["pgd", "trades"])
def test_a_step_follows_its_definition(source, kind):
    attacked = task(source, adversarial=kind, opt="sgd", momentum=0.0, weight_decay=0.0, warmup_steps=0)
    twin = task(source).model
    twin.load_state_dict(attacked.model.state_dict())
    attacked.place(0)
    batch, start = attacked.loader.batch(0), attacked.feed["start"]
    images, labels = batch.images, batch.labels
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (attacked.dataset.mean, attacked.dataset.std))
    twin.eval()
    clean = twin(images).log_softmax(1).detach()
    changed = torch.maximum(torch.minimum(images + start, (1 - mean) / std), -mean / std)
    for _ in range(2):
        changed = changed.detach().requires_grad_()
        if kind == "pgd":
            rise = F.cross_entropy(twin(changed), labels)
        else:
            # The divergence hardly differs from 0 here: signs of its gradient hang on how it is written.
            rise = F.kl_div(twin(changed).log_softmax(1), clean, reduction="batchmean", log_target=True)
        values = changed.detach() + 2 / 255 / std * torch.autograd.grad(rise, changed)[0].sign()
        values = torch.maximum(torch.minimum(values, images + 8 / 255 / std), images - 8 / 255 / std)
        changed = torch.maximum(torch.minimum(values, (1 - mean) / std), -mean / std)
    twin.train()
    if kind == "pgd":
        loss = F.cross_entropy(twin(changed), labels)
    else:
        logits = twin(images)
        wanted = logits.softmax(1)
        divergence = (wanted * (wanted.log() - twin(changed).log_softmax(1))).sum(1).mean()
        loss = F.cross_entropy(logits, labels) + 6.0 * divergence
    loss.backward()
    attacked.compute()
    torch.testing.assert_close(attacked.loss_sum / len(labels), loss.detach().double(), rtol=1e-5, atol=1e-6)
    expected = {name: p.grad for name, p in twin.named_parameters()}
    found = {name: p.grad for name, p in attacked.model.named_parameters()}
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_the_start_is_the_same_for_any_number_of_ranks(source):
    for kind in ("pgd", "trades"):
        attack = task(source, adversarial=kind).attack
        whole = attack.start(3, 8, 0)
        parts = torch.cat([attack.start(3, 4, rank) for rank in range(2)])
        assert torch.equal(whole, parts) and not torch.equal(whole, attack.start(4, 8, 0))


def test_training_on_adversarial_images_makes_robust(source, tmp_path, capsys):
    accuracy = {}
    for kind in ("off", "pgd"):
        run = [*TINY, "--dataset", source, "--steps", 60, "--lr", 0.1, "--adversarial", kind]
        if kind == "pgd":
            run += ["--adversarial-eps", "24/255", "--adversarial-step-size", "0.04", "--adversarial-steps", 4]
        assert status_of([*run, "--eval-every", 0, "--output", tmp_path / kind]) == 0
        attack = ["--pgd", "--pgd-eps", "24/255", "--pgd-images", 40, "--amp-dtype", "fp32"]
        assert status_of(["--checkpoint", tmp_path / kind, *attack], evaluate.main) == 0
        result = result_of(capsys)
        assert result["pgd_images"] == 40 and result["pgd_steps"] == 20
        accuracy[kind] = result["accuracy_pgd"]
        assert result["accuracy"] >= accuracy[kind]
    assert accuracy["pgd"] > accuracy["off"] + 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adversarial": "pgd", "mixup": 0.2}, "without --mixup"),
        ({"adversarial": "trades", "model": "dcgan", "model_options": {}}, "is for classifiers"),
        ({"adversarial": "pdg"}, "did you mean 'pgd'"),
        ({"adversarial_eps": 8.0}, "--adversarial-eps must be in"),
    ],
    ids=["mixup", "gan", "name", "radius"],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        recipe.resolve(options, has_gpu=False)


def test_compute_under_bfloat16(source):
    low = task(source, adversarial="trades", amp_dtype="bf16")
    low.train_step(0)
    assert low.loader.batch(0).images.dtype == torch.bfloat16 and low.loss_sum.isfinite()
