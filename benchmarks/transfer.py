"""`python -m benchmarks.transfer`: does a backbone of other classes help? Measured without ImageNet.

ds_resnet is trained on the first half of CIFAR-100's classes. Its backbone is then transferred to the other half in two
phases, first frozen, and compared with a training from scratch of as many steps on the same images.
"""

from __future__ import annotations

import argparse
import pathlib
import tempfile

import numpy

from benchmarks import reporting, trials
from fastcifar import data

PHASES = "1:1:frozen,3:0.5"


def write_half(dataset: data.ImageDataset, path: pathlib.Path, first: int, last: int) -> str:
    """An .npz of the classes from `first` to before `last`; returns its name for --dataset."""
    arrays = {"class_names": numpy.array(dataset.class_names[first:last])}
    for split in ("train", "test"):
        labels = getattr(dataset, f"{split}_labels")
        chosen = (labels >= first) & (labels < last)
        arrays[f"{split}_images"] = getattr(dataset, f"{split}_images")[chosen]
        arrays[f"{split}_labels"] = labels[chosen] - first
    numpy.savez(path, **arrays)
    return f"npz:{path}"


def main() -> None:
    """Trains, prints, writes results/transfer-cpu.json (or -cuda)."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transfer", description=__doc__.split("\n\n")[0])
    parser.add_argument("--pretrain-steps", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=200, help="on the other classes")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--data-dir", help="default: $FASTCIFAR_DATA")
    parser.add_argument("--folder", type=pathlib.Path, help="of the runs, to go on after an interruption")
    options = parser.parse_args()
    dataset = data.load_dataset("cifar100", options.data_dir)
    half = dataset.num_classes // 2
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or pathlib.Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        first = write_half(dataset, folder / "first.npz", 0, half)
        second = write_half(dataset, folder / "second.npz", half, dataset.num_classes)
        common = ["--preset", "demo", "--device", options.device, "--eval-every", "0"]
        source = [*common, "--dataset", first, "--steps", str(options.pretrain_steps)]
        pretrained = trials.run(folder / "pretrained", source)
        target = [*common, "--dataset", second, "--steps", str(options.steps)]
        backbone = ["--backbone", str(folder / "pretrained")]
        rows = trials.compare(
            folder,
            {
                "from scratch": target,
                "transferred, head alone": [*target, *backbone, "--phases", "1:1:frozen"],
                f"transferred, phases {PHASES}": [*target, *backbone, "--phases", PHASES],
            },
            options.seeds,
        )
    print(reporting.table(trials.printed(rows)))
    content = {"pretrained": {key: pretrained[key] for key in ("model", "steps", "batch_size", "test_accuracy")}}
    content |= {"steps": options.steps, "seeds": options.seeds, "rows": rows}
    print(reporting.save(f"transfer-{options.device.partition(':')[0]}", content))


if __name__ == "__main__":
    main()
