"""Phases of a run, a frozen backbone, and first weights of a backbone from elsewhere."""

import numpy
import pytest
import safetensors.torch
import torch
from distributed_case import run_ranks
from test_training import everything, make
from training_case import result_of, status_of, write_tiny

from fastcifar import data, models
from fastcifar.training import checkpoint, distributed, transfer

PHASES = "2:1:frozen,1:0.5,1:0.1"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return data.load_dataset(write_tiny(tmp_path_factory.mktemp("data") / "tiny.npz"))


@pytest.mark.parametrize(
    ("text", "steps", "expected"),
    [
        (None, 7, [(0, 7, 1.0, False)]),
        ("20:1:frozen,13:0.025,13:0.01", 46, [(0, 20, 1.0, True), (20, 33, 0.025, False), (33, 46, 0.01, False)]),
        ("1:1, 2:0.5:frozen", 10, [(0, 3, 1.0, False), (3, 10, 0.5, True)]),
        ("1:1,1:2,1:3", 1, [(0, 0, 1.0, False), (0, 1, 2.0, False), (1, 1, 3.0, False)]),
    ],
    ids=["none", "in epochs", "spaces", "one step"],
)
def test_phases_share_the_steps(text, steps, expected):
    assert list(map(tuple, transfer.phases(text, steps))) == expected


@pytest.mark.parametrize("text", ["1", "1:", "0:1", "1:-1", "1:1:froze", "1:1,,1:1", "1:nan", "a:b"])
def test_phases_that_cannot_be_read(text):
    with pytest.raises(ValueError, match="--phases .* must be LENGTH:FACTOR or LENGTH:FACTOR:frozen"):
        transfer.read_phases(text)


@pytest.mark.parametrize("name", sorted(set(models.list_models(gan=False)) - {"xception"}))
def test_every_classifier_has_a_head_behind_its_backbone(name):
    with torch.device("meta"):
        model = models.create_model(name, 10)
    inside = {id(p) for part in models.backbone(model).values() for p in part.parameters()}
    rest = [p for p in model.parameters() if id(p) not in inside]
    assert rest and all(p.shape[0] == 10 for p in rest)


def test_a_network_without_head_is_named():
    with pytest.raises(ValueError, match="Linear has no part called head or fc"):
        models.backbone(torch.nn.Linear(1, 1))


@pytest.mark.parametrize("opt", ["sgd", "adamw"])
def test_a_frozen_phase_trains_the_head_alone(opt, tiny):
    task = make(tiny, phases=PHASES, opt=opt, lr=0.01, sched="constant", weight_decay=0.1)
    first = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    for step in range(4):
        task.train_step(step)
        task.evaluate("test")  # must leave the backbone in evaluation mode
    changed = {name for name, tensor in task.model.state_dict().items() if not torch.equal(tensor, first[name])}
    assert changed == {"head.fc.weight", "head.fc.bias"}
    task.train_step(4)
    changed = {name for name, tensor in task.model.state_dict().items() if not torch.equal(tensor, first[name])}
    assert changed == set(first)


def test_the_rate_is_that_of_the_phase(tiny):
    task = make(tiny, phases=PHASES, lr=0.4, sched="constant")
    assert [task.learning_rate(step) for step in range(8)] == pytest.approx([0.4] * 4 + [0.2] * 2 + [0.04] * 2)


@pytest.mark.parametrize("at", [1, 4, 5])
@pytest.mark.parametrize("opt", ["sgd", "adam"])
def test_continuing_is_bit_exact_in_every_phase(at, opt, tiny, tmp_path):
    options = {"phases": PHASES, "opt": opt, "lr": 1e-3, "model_ema_decay": 0.9}
    whole, first, second = (make(tiny, **options) for _ in range(3))
    for step in range(7):
        whole.train_step(step)
    for step in range(at):
        first.train_step(step)
    second.load_state(checkpoint.load(checkpoint.save(tmp_path, at, *first.state())))
    for step in range(at, 7):
        second.train_step(step)
    assert everything(second) == everything(whole)


class FakeGraph:
    """Stands for a captured step."""

    def __init__(self, task):
        self.task, self.resets = task, []

    def reset(self):
        self.resets.append(self.task.seen // 16)

    def __call__(self):
        self.task.compute()


def test_a_captured_step_is_forgotten_where_another_part_is_trained(tiny):
    task = make(tiny, phases="2:1:frozen,2:1,2:0.5,2:0.5:frozen", lr=0.01)
    task.graph = FakeGraph(task)
    for step in range(8):
        task.train_step(step)
    assert task.graph.resets == [0, 2, 6]


def _train_on_ranks(rank, world_size, source, options):
    task = make(data.load_dataset(source), distributed.Processes(rank, world_size, rank), **options)
    for step in range(6):
        task.train_step(step)
    return {name: tensor.numpy() for name, tensor in task.model.state_dict().items()}


def test_two_ranks_go_through_the_phases_as_one_process(tmp_path):
    source = write_tiny(tmp_path / "tiny.npz")
    options = {"lr": 0.02, "phases": PHASES}
    results = run_ranks(_train_on_ranks, 2, source, options)
    for name, expected in _train_on_ranks(0, 1, source, options).items():
        assert (results[0][name] == results[1][name]).all(), name
        numpy.testing.assert_allclose(results[0][name], expected, rtol=2e-3, atol=2e-4, err_msg=name)


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


COMMAND = ["--model-option", "width=0.25", "-b", "16", "--amp-dtype", "fp32", "--device", "cpu", "--lr", "0.02"]


def test_transfer_to_other_classes_by_the_command_line(place, capsys):
    first, second = write_tiny(place / "five.npz"), write_tiny(place / "three.npz", classes=3)
    assert status_of([*COMMAND, "--dataset", first, "--steps", 8, "--output", "first", "--model-ema-decay", 0.5]) == 0
    arguments = [*COMMAND, "--dataset", second, "--steps", 6, "--phases", "1:1:frozen", "--backbone", "first"]
    assert status_of([*arguments, "--output", "second"]) == 0
    result = result_of(capsys)
    assert (result["steps"], result["resumed_at"]) == (6, 0)
    before, after = (checkpoint.find(name, print).tensors for name in ("first", "second"))
    kept = [name for name in after if name.startswith("model.st")]
    assert len(kept) > 20 and all(torch.equal(after[name], before["ema." + name[6:]]) for name in kept)
    # Going on needs the weights' first source no more.
    (place / "first").rename(place / "gone")
    assert status_of(["--resume", "second"]) == 0 and result_of(capsys)["resumed_at"] == 6


def test_a_dry_run_shows_the_phases(place, capsys):
    source = write_tiny(place / "tiny.npz")
    assert status_of([*COMMAND, "--dataset", source, "--steps", 40, "--phases", PHASES, "-n"]) == 0
    shown = capsys.readouterr().out
    assert "steps 1 to 20: learning rate × 1, the head alone\nsteps 21 to 30: learning rate × 0.5\n" in shown


def test_a_backbone_from_a_file(tiny, place):
    source = {name: tensor.contiguous() for name, tensor in make(tiny, seed=1).model.state_dict().items()}
    safetensors.torch.save_file(source, place / "weights.safetensors")
    task = make(tiny)
    head = task.model.head.fc.weight.clone()
    transfer.load_backbone(task.model, transfer.read_backbone("weights.safetensors", "ds_resnet"), "weights")
    assert torch.equal(task.model.stem.conv.weight, source["stem.conv.weight"])
    assert torch.equal(task.model.head.fc.weight, head)


BAD = {
    "phases": (["--phases", "1:1:frosen"], "'1:1:frosen' must be LENGTH:FACTOR"),
    "both weights": (["--backbone", "a", "--init-weights", "b"], "--backbone all but the head's"),
    "absent": (["--backbone", "absent"], "there is no absent"),
    "published": (["--backbone", "imagenet"], "--backbone imagenet is for --model xception"),
    "not tensors": (["--backbone", "tiny.npz"], "refused, not a file of named tensors"),
    "another network": (["--backbone", "other.safetensors"], "stem.conv.weight has shape (8, 3, 3, 3) here and"),
    "GAN": (["--model", "aw_sngan", "--phases", "1:1"], "--phases is for classifiers, aw_sngan is a GAN"),
    "preset of another model": (["--preset", "cifar10-speed", "--model", "ds_resnet"], "is for resnet_cifar10, not"),
    "preset for a GAN": (["--preset", "best", "--model", "dcgan"], "--preset best is for classifiers, dcgan is a GAN"),
}


@pytest.mark.parametrize(("arguments", "words"), BAD.values(), ids=BAD.keys())
def test_wrong_command_lines(arguments, words, place, capsys):
    source = write_tiny(place / "tiny.npz")
    safetensors.torch.save_file({"stem.conv.weight": torch.zeros(2)}, place / "other.safetensors")
    base = [] if "--model" in arguments else COMMAND
    assert status_of([*base, "--dataset", source, "--steps", 2, *arguments]) == 2
    message = capsys.readouterr().err
    assert words in message and len(message.splitlines()) == 1
