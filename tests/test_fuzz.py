"""Configuration files and checkpoints of any content: an error of one line or success, nothing else changed."""

import json
import pathlib
import shutil
import string

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from training_case import status_of, write_tiny

from fastcifar import data, evaluate, generate, train
from fastcifar.training import checkpoint, recipe
from fastcifar.training.options import Recipe, options

FIXTURES = pathlib.Path(__file__).parent / "fixtures" / f"format-{checkpoint.FORMAT}"
EXAMPLES = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)

NUMBERS = st.integers() | st.floats() | st.sampled_from([2**63, -1, 0])
SCALARS = st.none() | st.booleans() | NUMBERS | st.text(max_size=20) | st.sampled_from(["", "auto"])
TABLES = st.dictionaries(st.text(max_size=5), SCALARS, max_size=3)
VALUES = SCALARS | TABLES | st.lists(SCALARS | TABLES, max_size=3)
KEYS = st.sampled_from([option.name for option in options()] + ["model_options"]) | st.text(max_size=8)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    write_tiny(folder / "tiny.npz")
    write_tiny(folder / "tiny32.npz", size=32)
    return folder


def content(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def check(status, captured):
    """Success, or one line of error."""
    assert "Traceback" not in captured.err + captured.out
    if status != 0:
        assert status == 2, captured.err
        last = captured.err.splitlines()[-1]
        assert last.startswith("python -m fastcifar.") and len(last) < 1100 and last.isprintable()
        assert all(line.startswith("WARNING: ") for line in captured.err.splitlines()[:-1])


class Reached(data.DataError):
    """All that comes before the data has been passed."""


def run_config(folder, monkeypatch, capsys):
    def stop(*arguments, **keywords):
        raise Reached("stopped here by the test, which trains nothing")

    with monkeypatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(train.data, "load_dataset", stop)
        before = content(folder)
        check(status_of(["--config", "c.yaml", "--device", "cpu", "--output", "new"]), capsys.readouterr())
        assert content(folder) == before and not (folder / "new").exists()


@EXAMPLES
@given(table=st.dictionaries(KEYS, VALUES, max_size=4))
def test_configurations_of_any_values(table, place, monkeypatch, capsys, record_property):
    (place / "c.yaml").write_text(json.dumps(table))
    record_property("examples", 1)
    run_config(place, monkeypatch, capsys)


@EXAMPLES
@given(raw=st.binary(max_size=60) | st.text(string.printable, max_size=60).map(str.encode))
def test_configurations_of_any_bytes(raw, place, monkeypatch, capsys, record_property):
    (place / "c.yaml").write_bytes(raw)
    record_property("examples", 1)
    run_config(place, monkeypatch, capsys)


BOMBS = {
    "billion laughs": "a: &a [x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"{k}: &{k} [{', '.join(['*' + j] * 9)}]\n" for j, k in zip("abcdefgh", "bcdefghi", strict=True))
    + "lr: *i\n",
    "alias of itself": "lr: &a [*a]\n",
    "merge": "base: &b {lr: 0.1}\n<<: *b\n",
    "deep nesting": "lr: " + "[" * 5_000,
    "deep flow": "lr: " + "{a: " * 5_000,
    "large file": "# " + "x" * 2**21,
    "python object": "lr: !!python/object/apply:os.system ['touch canary']",
    "python name": "lr: !!python/name:os.system",
    "python tuple": "lr: !!python/tuple [1, 2]",
    "own tag": "lr: !evil 3",
    "many digits": "steps: " + "9" * 5_000,
    "long key": "? " + "k" * 50_000 + "\n: 1",
    "control characters": 'lr: "\\e[2J\\e]0;owned\\a"',
    "two documents": "lr: 0.1\n---\nlr: 0.2\n",
    "date": "lr: 2001-01-01",
}


@pytest.mark.parametrize("text", BOMBS.values(), ids=BOMBS.keys())
def test_yaml_bombs(text, place, monkeypatch, capsys):
    pytest.importorskip("yaml")
    (place / "c.yaml").write_text(text)
    with pytest.raises(ValueError) as error:
        recipe.resolve({}, recipe.read_config(str(place / "c.yaml")), has_gpu=False)
    assert len(str(error.value)) < 100_000
    run_config(place, monkeypatch, capsys)
    assert not (place / "canary").exists()


@pytest.fixture(params=["classifier", "gan"])
def run(request, place):
    """A run folder with a sound checkpoint below the one that a test damages."""
    folder = place / request.param
    shutil.rmtree(folder, ignore_errors=True)
    step = {"classifier": 4, "gan": 2}[request.param]
    shutil.copytree(FIXTURES / request.param, folder / f"checkpoints/step-{step:08d}")
    shutil.copytree(FIXTURES / request.param, folder / "checkpoints/step-00000005")
    return folder


COMMANDS = {"evaluate": evaluate.main, "generate": generate.main}


def use(run, place, monkeypatch, capsys):
    """Both commands that read a checkpoint, and a resumed run up to its data."""

    def stop(*arguments, **keywords):
        raise Reached("stopped here by the test, which trains nothing")

    with monkeypatch.context() as patch:
        patch.chdir(place)
        patch.setattr(data, "load_dataset", stop)
        before = content(run)
        for name, main in COMMANDS.items():
            patch.setattr(generate, "_sheet", stop)
            check(status_of(["--checkpoint", run], main, f"python -m fastcifar.{name}"), capsys.readouterr())
        check(status_of(["--resume", run]), capsys.readouterr())
        assert content(run) == before


@EXAMPLES
@given(change=st.data())
def test_checkpoints_of_any_bytes(change, run, place, monkeypatch, capsys, record_property):
    target = run / "checkpoints/step-00000005" / change.draw(st.sampled_from(["state.safetensors", "checkpoint.json"]))
    sound = (FIXTURES / run.name / target.name).read_bytes()
    begin = change.draw(st.integers(0, len(sound)))
    end = change.draw(st.integers(begin, min(len(sound), begin + 200)))
    target.write_bytes(sound[:begin] + change.draw(st.binary(max_size=40)) + sound[end:])
    record_property("examples", 1)
    use(run, place, monkeypatch, capsys)


@EXAMPLES
@given(change=st.data())
def test_checkpoints_of_any_content_with_the_right_hash(change, run, place, monkeypatch, capsys, record_property):
    """As someone would write them who means harm."""
    target = run / "checkpoints/step-00000005/checkpoint.json"
    note = json.loads((FIXTURES / run.name / "checkpoint.json").read_text())
    where = change.draw(st.sampled_from([note, note["state"], note["state"]["config"]]))
    key = change.draw(st.sampled_from(sorted(where)) | st.text(max_size=5))
    if change.draw(st.booleans()):
        where.pop(key, None)
    else:
        where[key] = change.draw(VALUES)
    if where is not note or key != "own_sha256":
        note["own_sha256"] = checkpoint._own_sha256(note)
    target.write_text(json.dumps(note))
    record_property("examples", 1)
    use(run, place, monkeypatch, capsys)


def test_a_fuzzed_recipe_is_one_that_a_command_line_can_make():
    assert {option.name for option in options()} | {"model_options"} == set(Recipe.__dataclass_fields__)
