"""`python -m benchmarks.distil --teacher RUN`: the same short training with and without a teacher.

ds_resnet on CIFAR-100, preset demo cut to some steps; alternatives of the distillation's temperature and weight.
"""

from __future__ import annotations

import argparse
import pathlib
import tempfile

from benchmarks import reporting, trials
from fastcifar.training import checkpoint


def main() -> None:
    """Trains, prints, writes results/distil-cpu.json (or -cuda)."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distil", description=__doc__.split("\n\n")[0])
    parser.add_argument("--teacher", required=True, metavar="RUN")
    parser.add_argument("--settings", nargs="+", default=["4:0.9", "2:0.5"], metavar="TEMPERATURE:WEIGHT")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=pathlib.Path, help="of the runs, to go on after an interruption")
    options = parser.parse_args()
    saved = checkpoint.find(options.teacher, notify=print)
    common = ["--preset", "demo", "--dataset", "cifar100", "--device", options.device, "--eval-every", "0"]
    common += ["--steps", str(options.steps)]
    alternatives = {"labels alone": common}
    for setting in options.settings:
        temperature, _, weight = setting.partition(":")
        flags = ["--teacher", options.teacher, "--kd-temperature", temperature, "--kd-weight", weight]
        alternatives[f"distilled, T = {temperature}, weight {weight}"] = [*common, *flags]
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or pathlib.Path(temporary)
        rows = trials.compare(folder, alternatives, options.seeds)
    print(reporting.table(trials.printed(rows)))
    teacher = {"model": saved.state["config"]["model"], "steps": saved.step}
    content = {"teacher": teacher, "steps": options.steps, "seeds": options.seeds, "rows": rows}
    print(reporting.save(f"distil-{options.device.partition(':')[0]}", content))


if __name__ == "__main__":
    main()
