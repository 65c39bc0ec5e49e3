"""`python -m fastcifar.train`: trains a network on CIFAR-100, CIFAR-10 or your own images."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any

_STARTED = time.perf_counter()

import torch  # noqa: E402

from fastcifar import command_line, data, models, profiling, recipe_flags  # noqa: E402
from fastcifar.training import (  # noqa: E402
    checkpoint,
    distributed,
    environment,
    loop,
    memory,
    recipe,
    run_folder,
    trackers,
    transfer,
)
from fastcifar.training.adversarial import Adversarial  # noqa: E402
from fastcifar.training.classify import Classification  # noqa: E402
from fastcifar.training.curves import draw_curves  # noqa: E402
from fastcifar.training.options import Recipe  # noqa: E402
from fastcifar.training.progress import Lines, format_duration, reporter  # noqa: E402

_RUNS = pathlib.Path("runs")
_NOT_FINITE, _SAVE_FAILED, _OUT_OF_MEMORY = 3, 4, 5


def _parser() -> command_line.Parser:
    parser = recipe_flags.parser(
        "python -m fastcifar.train", "Trains a network. The last line printed is the result, one JSON object."
    )
    parser.add_argument("-n", "--dry-run", action="store_true", help="show configuration, size and time, train nothing")
    return parser


def _resolve(arguments: Any, has_gpu: bool) -> tuple[Recipe, checkpoint.Checkpoint | None]:
    """The recipe, and the checkpoint to go on from; a resumed run brings its own options along."""
    flags = recipe_flags.given(arguments)
    config = recipe.read_config(arguments.config) if arguments.config else {}
    resume = flags.get("resume", config.get("resume"))
    if not isinstance(resume, str):
        fresh = recipe.resolve(flags, config, has_gpu=has_gpu)
        recipe.check_effect(flags, fresh)
        return fresh, None
    if resume == "auto":
        fresh = recipe.resolve(flags, config, has_gpu=has_gpu)
        recipe.check_effect(flags, fresh)
        place = pathlib.Path(fresh.output) if fresh.output else run_folder.newest_folder(_RUNS, _folder_name(fresh))
        if not checkpoint.list_checkpoints(place / "checkpoints"):
            if fresh.eval_only:
                raise command_line.UsageError(f"--eval-only: no checkpoint in {place}; give --resume RUN")
            print(f"--resume auto: no checkpoint in {place}, starting from the beginning", flush=True)
            return dataclasses.replace(fresh, output=str(place)), None
    else:
        place = _continued(resume, flags.get("output")) or pathlib.Path(resume)
    saved = checkpoint.find(place, notify=lambda text: print(f"WARNING: {text}", file=sys.stderr))
    old = saved.config
    # A checkpoint counts its budget in steps; how many an epoch has is known when the images are.
    epochs = None if "steps" in flags else flags.pop("epochs", config.get("epochs"))
    if epochs is not None:
        config = {key: value for key, value in config.items() if key not in ("epochs", "steps")}
    wanted = recipe.resolve({**flags, "resume": resume}, {**old, **config, "init_weights": None}, has_gpu=has_gpu)
    changed = recipe.differences(old, dataclasses.asdict(wanted))
    if changed:
        raise command_line.UsageError(
            f"{saved.path} belongs to a run with other options ({'; '.join(changed)}); drop these flags, or start a "
            "new run with another --output"
        )
    # Where its first weights came from stays known.
    wanted = dataclasses.replace(wanted, init_weights=old.get("init_weights"))
    if epochs is not None:
        wanted = dataclasses.replace(wanted, steps=None, epochs=epochs)
    if not arguments.output:
        wanted = dataclasses.replace(wanted, output=str(checkpoint.run_folder(saved.path)))
    return wanted, saved


def _continued(resume: str, output: str | None) -> pathlib.Path | None:
    """The run folder that an earlier start of the same command made: it goes on with that, and not with `resume`."""
    if output is None or not checkpoint.list_checkpoints(pathlib.Path(output) / "checkpoints"):
        return None
    made = checkpoint.find(pathlib.Path(output), notify=lambda text: None)
    return pathlib.Path(output) if made.config.get("resume") == resume else None


def _check_budget(chosen: Recipe, saved: checkpoint.Checkpoint | None) -> None:
    if saved is not None and saved.config["steps"] != chosen.steps:
        raise command_line.UsageError(
            f"{saved.path} belongs to a run of {saved.config['steps']} steps, --epochs asks for {chosen.steps}; drop "
            "--epochs, or start a new run with another --output"
        )


def _folder_name(chosen: Recipe) -> str:
    kind = "".join(c if c.isalnum() else "-" for c in chosen.dataset)
    return f"{chosen.model}-{kind}-{chosen.preset}-seed{chosen.seed}"


def _place(chosen: Recipe, saved: checkpoint.Checkpoint | None) -> pathlib.Path:
    if chosen.output is None:
        return run_folder.new_folder(_RUNS, _folder_name(chosen))
    place = pathlib.Path(chosen.output)
    if place.exists() and not place.is_dir():
        raise command_line.UsageError(f"--output {place} is a file; give a folder")
    own = saved is not None and place.resolve() == checkpoint.run_folder(saved.path).resolve()
    if not own and (found := checkpoint.list_checkpoints(place / "checkpoints")):
        raise command_line.UsageError(
            f"--output {place} already holds a run ({found[0].name}); pass --resume auto to go on with it, or choose "
            "another folder"
        )
    return place


def _check(chosen: Recipe) -> None:
    """All that can be checked before any data is read."""
    try:
        models.create_model(chosen.model, **chosen.model_options)
    except (RuntimeError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        raise command_line.UsageError(f"--model {chosen.model} cannot be built so ({reason})") from error
    trackers.check(chosen)


def _dry_run(chosen: Recipe, task: Classification | Adversarial) -> int:
    shown = {key: value for key, value in dataclasses.asdict(chosen).items() if value is not None}
    for key, value in shown.items():
        print(f"{key}: {json.dumps(value)}")
    print(f"parameters: {models.count_parameters(task.model)}")
    seconds, by_kind = 0.0, {}
    for phase in transfer.phases(chosen.phases, chosen.steps):
        if phase.start == phase.stop:
            continue
        if phase.frozen not in by_kind:
            by_kind[phase.frozen] = _step_seconds(task, phase.start)
        seconds += by_kind[phase.frozen] * (phase.stop - phase.start)
        if chosen.phases:
            kind = ", the head alone" if phase.frozen else ""
            print(f"steps {phase.start + 1} to {phase.stop}: learning rate × {phase.factor:g}{kind}")
    per_step = f"{1000 * seconds / chosen.steps:.1f} ms a step on {task.device}"
    print(f"estimated time: {format_duration(seconds)} ({per_step})")
    return 0


def _step_seconds(task: Classification | Adversarial, first: int) -> float:
    """Median time of some steps from this one on."""
    times: list[float] = []
    while len(times) < 2 or (len(times) < 8 and sum(times) < 10.0):
        started = time.perf_counter()
        task.train_step(first + len(times))
        if task.device.type == "cuda":
            torch.cuda.synchronize(task.device)
        times.append(time.perf_counter() - started)
    return sorted(times[1:])[len(times[1:]) // 2]


def _result(task: Classification | Adversarial, train_loop: loop.Loop, started_at: int) -> dict[str, Any]:
    chosen, dataset = task.recipe, task.dataset
    result = {
        "model": chosen.model,
        "dataset": dataset.name,
        "synthetic": dataset.synthetic,
        "preset": chosen.preset,
        "seed": chosen.seed,
        "steps": train_loop.step,
        "batch_size": chosen.batch_size,
        "seconds": round(train_loop.seconds, 3),
        "images_per_second": round(train_loop.step * chosen.batch_size / max(train_loop.seconds, 1e-9), 1),
        **task.summary(),
    }
    return result | {
        "parameters": models.count_parameters(task.model),
        "amp_dtype": str(task.amp_dtype).removeprefix("torch."),
        "device": str(task.device),
        "skipped_steps": int(task.bad_steps),
        "rollbacks": train_loop.rollbacks,
        "resumed_at": started_at,
        "notices": list(dataset.notices),
        "state_sha256": checkpoint.state_sha256(task.network_tensors()),
    }


def _train(task: Classification | Adversarial, train_loop: loop.Loop, folder: run_folder.RunFolder | None) -> int:
    """Runs the loop and writes the result; the exit status."""
    started_at, progress = train_loop.step, train_loop.progress
    try:
        if not task.recipe.eval_only:
            train_loop.run()
        result = _result(task, train_loop, started_at)
    except loop.Stopped as stopped:
        progress.close()
        progress.message(str(stopped))
        return 128 + (stopped.signal or signal.SIGTERM)
    except (loop.NotFinite, loop.SaveFailed) as failure:
        progress.close()
        _complain(str(failure))
        return _NOT_FINITE if isinstance(failure, loop.NotFinite) else _SAVE_FAILED
    except loop.OutOfMemory as failure:
        progress.close()
        _complain(memory.describe(task, failure.step, str(failure)))
        return _OUT_OF_MEMORY
    finally:
        progress.close()
    return _report(task, result, progress, folder) if folder is not None else 0


def _complain(problem: str) -> None:
    print(f"python -m fastcifar.train: error: {problem}", file=sys.stderr)


def _report(
    task: Classification | Adversarial, result: dict[str, Any], progress: Lines, folder: run_folder.RunFolder
) -> int:
    """Draws the curves, writes and prints the result; the exit status."""
    status = 0
    try:
        if not task.recipe.eval_only:
            title = f"{result['model']} on {result['dataset']}, preset {result['preset']}, seed {result['seed']}"
            missing = draw_curves(folder.rows, folder.path / "curves.png", title)
            if missing:
                progress.message(missing)
        if not (task.recipe.eval_only and (folder.path / "result.json").exists()):
            run_folder.write_json(folder.path / "result.json", result)
    except OSError as failure:
        _complain(f"the result could not be written to {folder.path} ({failure}); it is printed here only")
        status = _SAVE_FAILED
    print(json.dumps(result), flush=True)
    return status


def main(arguments: Sequence[str]) -> int:
    """Trains as the arguments say; returns the exit status.

    Raises:
        ValueError, OSError: a mistake of the user; the message says what to do.
    """
    parsed = _parser().parse_args(arguments)
    chosen, saved = _resolve(parsed, torch.cuda.is_available())
    _check(chosen)
    processes = distributed.from_environment()
    device = environment.choose_device(chosen.device, processes.local_rank)
    place = _place(chosen, saved)
    if chosen.nvtx:
        profiling.enable()
    put_first_weights = transfer.first_weights(chosen, saved)
    settings = environment.prepare_process(device, deterministic=chosen.deterministic)
    dataset = data.load_dataset(chosen.dataset, chosen.data_dir, download=not parsed.dry_run, seed=0)
    dataset = data.hold_out(dataset, chosen.holdout)
    chosen = recipe.with_budget(chosen, len(dataset.train_images))
    _check_budget(chosen, saved)
    folder = None
    distributed.join(processes, device)
    try:
        processes.check_same("begins after step", saved.step if saved else 0)
        gan = chosen.model in models.list_models(gan=True)
        columns = run_folder.GAN_COLUMNS if gan else run_folder.COLUMNS
        shown = dataclasses.replace(chosen, kd_cache=False) if parsed.dry_run else chosen
        task = (Adversarial if gan else Classification)(shown, dataset, device, processes)
        put_first_weights(task)
        if parsed.dry_run:
            return _dry_run(chosen, task)
        folder = run_folder.RunFolder(place, None, columns) if processes.is_first else None
        progress = reporter(chosen.steps, folder.log if folder is not None else None)
        for notice in (*dataset.notices, task.graph_notice):
            if notice:
                progress.message(notice)
        train_loop = loop.Loop(task, folder, progress, processes)
        if saved is not None:
            train_loop.resume(saved)
        # An evaluation leaves the run that it looks at as it is.
        if folder is not None and not (chosen.eval_only and saved):
            folder.rewind(train_loop.step)
            settings["startup_seconds"] = round(time.perf_counter() - _STARTED, 2)
            config = dataclasses.asdict(chosen)
            folder.describe(config, environment.describe(device, settings))
            folder.trackers = trackers.open_trackers(chosen, place, config)
            progress.message(
                f"{chosen.model} ({models.count_parameters(task.model):,} parameters) on {dataset.source}; preset "
                f"{chosen.preset}, {chosen.steps} steps × {chosen.batch_size}, {device}; run in {place}"
            )
        return _train(task, train_loop, folder)
    finally:
        if folder is not None:
            folder.close()
        distributed.leave()


if __name__ == "__main__":
    command_line.run("python -m fastcifar.train", main)
