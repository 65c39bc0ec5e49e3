"""Wrong command lines: one line that names the fix, exit status 2, no traceback, nothing written or overwritten."""

import json
import pathlib
import shutil

import pytest
from training_case import status_of, write_tiny

from fastcifar import doctor, evaluate, generate, train

FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "format-2"
COMMANDS = {"train": train.main, "evaluate": evaluate.main, "generate": generate.main, "doctor": doctor.main}

TRAIN = {
    "unknown flag": "--epoch 3",
    "unknown model": "--model ds_resent",
    "unknown data set": "--dataset cifar-100",
    "unknown preset": "--preset quick",
    "unknown optimiser": "--opt sdg",
    "unknown schedule": "--sched cosinus",
    "unknown flip": "--hflip alternate",
    "unknown impl": "--impl cuda",
    "unknown placement": "--data-placement split",
    "unknown dtype": "--amp-dtype float16",
    "unknown device": "--device gpu",
    "no such GPU": "--device cuda:99",
    "unknown model option": "--model-option activations=silu",
    "bad model option": "--model-option activation=sinus",
    "model option without value": "--model-option width",
    "model option without name": "--model-option =3",
    "model option of another kind": "--model-option width=wide",
    "width of zero": "--model-option width=0",
    "width beyond all memory": "--model-option width=1e15",
    "list where a number belongs": "--model-option width=1,2",
    "number where a list belongs": "--model-option strides=2",
    "truth where a number belongs": "--model dcgan --model-option width=true",
    "text as number": "--lr fast",
    "fraction as count": "--steps 1.5",
    "zero steps": "--steps 0",
    "negative steps": "--steps -5",
    "more steps than fit": "--steps 1e300",
    "negative rate": "--lr -0.1",
    "infinite rate": "--lr inf",
    "rate that is no number": "--lr nan",
    "momentum of one": "--momentum 1",
    "negative decay": "--weight-decay -1",
    "smoothing of one": "--label-smoothing 1",
    "no images": "--batch-size 0",
    "negative seed": "--seed -1",
    "no checkpoint kept": "--keep-last 0",
    "steps and epochs": "--steps 3 --epochs 1",
    "no epochs": "--epochs 0",
    "long warm-up": "--steps 3 --warmup-steps 4",
    "both mixes": "--mixup 1 --cutmix 1",
    "resume and first weights": "--resume auto --init-weights x",
    "absent checkpoint": "--resume absent",
    "checkpoint without content": "--resume empty",
    "damaged checkpoint": "--resume damaged",
    "checkpoint of a newer version": "--resume newer",
    "checkpoint with other options": "--resume classifier --lr 0.9",
    "checkpoint of another model": "--resume classifier --model dcgan",
    "absent first weights": "--init-weights absent",
    "first weights of another network": "--init-weights gan --model ds_resnet --output new",
    "evaluation of nothing": "--eval-only",
    "absent folder of data": "--dataset cifar100 --data-dir absent",
    "absent npz": "--dataset npz:absent.npz",
    "npz without path": "--dataset npz:",
    "npz that is none": "--dataset npz:note.txt",
    "npz with pickles": "--dataset npz:pickled.npz",
    "absent folder": "--dataset folder:absent",
    "folder without classes": "--dataset folder:empty",
    "absent configuration": "--config absent.yaml",
    "configuration is a folder": "--config empty",
    "configuration with an unknown option": "--config unknown.yaml",
    "configuration with a wrong kind": "--config kind.yaml",
    "configuration of binary": "--config tiny.npz",
    "output is a file": "--output tiny.npz",
    "output below a file": "--output tiny.npz/run",
    "output holds a run": "--output classifier --dataset npz:tiny.npz",
    "large crop": "--crop-pad 40",
    "missing value": "--lr",
    "stray argument": "ds_resnet",
    "nan policy": "--nan rollback!",
    "colour of a GAN": "--model aw_sngan --color-jitter 0.1",
    "GAN's option": "--unconditional",
}
EVALUATE = {
    "no checkpoint": "",
    "absent": "--checkpoint absent",
    "without content": "--checkpoint empty",
    "a file": "--checkpoint note.txt",
    "damaged": "--checkpoint damaged",
    "of a GAN": "--checkpoint gan",
    "unknown split": "--checkpoint classifier --split tests",
    "unknown dtype": "--checkpoint classifier --amp-dtype fp8",
    "unknown impl": "--checkpoint classifier --impl fast",
    "unknown device": "--checkpoint classifier --device tpu",
    "unknown data set": "--checkpoint classifier --dataset mnist",
    "flag": "--checkpoint classifier --tt",
}
GENERATE = {
    "no checkpoint": "",
    "absent": "--checkpoint absent",
    "of a classifier": "--checkpoint classifier",
    "damaged": "--checkpoint damaged",
    "classes of a GAN without": "--checkpoint gan --classes apple",
    "seeds": "--checkpoint gan --seeds a-b",
    "no seeds": "--checkpoint gan --seeds 5-3",
    "truncation": "--checkpoint gan --truncation 2",
    "format": "--checkpoint gan --count 3 --format gif",
    "no images": "--checkpoint gan --count 0",
    "path": "--checkpoint gan --path straight",
    "output is a file": "--checkpoint gan --output note.txt",
}
DOCTOR = {"flag": "--fix", "stray argument": "gpu", "absent folder": "--data-dir absent", "missing value": "--data-dir"}
LINES = [
    pytest.param(command, line.split(), id=f"{command}-{name}")
    for command, lines in (("train", TRAIN), ("evaluate", EVALUATE), ("generate", GENERATE), ("doctor", DOCTOR))
    for name, line in lines.items()
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of runs, sound and not, and of files that look like something."""
    folder = tmp_path_factory.mktemp("place")
    write_tiny(folder / "tiny.npz")
    write_tiny(folder / "tiny32.npz", size=32)
    for name, kind, step in (("classifier", "classifier", 4), ("gan", "gan", 2), ("damaged", "gan", 2)):
        shutil.copytree(FIXTURES / kind, folder / name / "checkpoints" / f"step-{step:08d}")
    state = folder / "damaged/checkpoints/step-00000002/state.safetensors"
    state.write_bytes(state.read_bytes()[:-1] + b"?")
    newer = shutil.copytree(folder / "gan", folder / "newer") / "checkpoints/step-00000002/checkpoint.json"
    newer.write_text(json.dumps({**json.loads(newer.read_text()), "format": 99}))
    (folder / "empty").mkdir()
    (folder / "note.txt").write_text("a note")
    (folder / "pickled.npz").write_bytes(b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0ctouch canary\x85R.")
    (folder / "unknown.yaml").write_text("learning_rate: 0.1\n")
    (folder / "kind.yaml").write_text("lr: [0.1, 0.2]\n")
    return folder


def content(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize(("command", "arguments"), LINES)
def test_a_wrong_command_line(command, arguments, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.delenv("FASTCIFAR_DATA", raising=False)
    if command == "train" and not {"--dataset", "--resume"} & set(arguments):
        arguments = ["--dataset", "npz:tiny.npz", *arguments]
    before = content(place)
    assert status_of(arguments, COMMANDS[command], f"python -m fastcifar.{command}") == 2
    captured = capsys.readouterr()
    last = captured.err.splitlines()[-1]
    assert last.startswith(f"python -m fastcifar.{command}: error: ") and len(last) > 50
    # A damaged checkpoint is told of on a line of its own.
    assert all(line.startswith("WARNING: ") for line in captured.err.splitlines()[:-1])
    assert "Traceback" not in captured.err + captured.out
    assert content(place) == before


def test_there_are_enough_of_them():
    assert len(LINES) >= 90
