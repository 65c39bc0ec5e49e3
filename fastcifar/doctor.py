"""`python -m fastcifar.doctor`: what runs here, what does not, and what to do about it."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
from collections.abc import Iterator, Sequence

import torch

import fastcifar
from fastcifar import command_line, data, dispatch, native
from fastcifar.training import environment

_OPTIONAL = {
    "triton": "no Triton kernels; the native or reference implementations run",
    "rich": "no progress bar; plain lines instead",
    "yaml": "--config does not work",
    "matplotlib": "no curves.png and confusion.png",
    "nvtx": "no ranges in Nsight",
    "torchvision": "no Inception network for FID, no torchvision models to fuse",
    "PIL": "no folder: data sets",
}
_PACKAGES = {"yaml": "PyYAML", "PIL": "Pillow"}


def _packages() -> Iterator[tuple[str, str, str | None]]:
    """(name, state, what to do) of everything that may be missing."""
    for module, consequence in _OPTIONAL.items():
        package = _PACKAGES.get(module, module)
        try:
            importlib.import_module(module)
            yield package, importlib.metadata.version(package), None
        except importlib.metadata.PackageNotFoundError:
            yield package, "installed, version unknown", None
        except Exception as error:  # a broken package may raise anything
            reason = " ".join(str(error).split())[:120]
            yield package, f"cannot be imported ({reason}): {consequence}", f"run `pip install {package}`"


def _device() -> tuple[str, str | None]:
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return f"{', '.join(names)} (CUDA {torch.version.cuda})", None
    if torch.version.cuda is None:
        return "none: this torch is a CPU build", "install a CUDA build of torch if this machine has an NVIDIA GPU"
    return f"none: torch is built for CUDA {torch.version.cuda} and sees no GPU", "check the NVIDIA driver, if any"


def main(arguments: Sequence[str]) -> int:
    """Prints the report; returns 0.

    Raises:
        ValueError: an unknown argument.
    """
    parser = command_line.Parser(prog="python -m fastcifar.doctor", description=__doc__)
    parser.add_argument("--data-dir", metavar="DIR", help="folder of the CIFAR archives or folders")
    parsed = parser.parse_args(arguments)
    advice: list[str] = []

    def line(name: str, state: str, remedy: str | None = None) -> None:
        print(f"{name:<14} {state}")
        if remedy:
            advice.append(f"{name}: {remedy}")

    line("fastcifar", fastcifar.__version__)
    line("python", platform.python_version())
    line("torch", torch.__version__)
    line("processor", f"{environment.processor_name()}, torch uses {torch.get_num_threads()} threads")
    line("GPU", *_device())
    missing = native.why_not()
    info = ", ".join(f"{key} {value}" for key, value in native.build_info().items())
    line("native module", missing or info, missing and missing.rpartition("; ")[2])
    for package in _packages():
        line(*package)
    for name in ("cifar100", "cifar10"):
        place = data.locate_dataset(name, parsed.data_dir)
        remedy = None if place else "pass --data-dir, set FASTCIFAR_DATA, or let the trainer download it"
        line(name, str(place) if place else "not found", remedy)
    device = environment.choose_device("auto")
    line("arithmetic", f"{environment.choose_amp_dtype('auto', device)} by default on {device}")
    print("\nImplementations:")
    print(dispatch.explain())
    print("\nWhat to do:" if advice else "\nEverything is in place.")
    for text in advice:
        print(f"- {text}")
    return 0


if __name__ == "__main__":
    command_line.run("python -m fastcifar.doctor", main)
