"""Networks as programs that need nothing of this package: ONNX and torch.export, checked against the original."""

from __future__ import annotations

import importlib.metadata
import pathlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fastcifar import data, validation
from fastcifar.folding import fold_batch_norm

FORMATS = {"onnx": ".onnx", "torch": ".pt2"}
# Of the largest output: what folding and another runtime's order of additions may change in float32.
TOLERANCE = 1e-4
_BATCH = 250


class Pixels(nn.Module):
    """A classifier of images [N, 3, H, W] with values in [0, 1]: the normalisation of its data set goes first."""

    def __init__(self, classifier: nn.Module, dataset: data.ImageDataset):
        super().__init__()
        self.classifier = classifier
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(getattr(dataset, name)).view(3, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier((images - self.mean) / self.std)


def write(path: pathlib.Path, kind: str, model: nn.Module, inputs: Mapping[str, torch.Tensor], output: str) -> None:
    """Writes the folded model; the first dimension of every input and of the output stays free.

    Args:
        path: of the file, replaced when it is there.
        kind: "onnx" or "torch" (a program that `torch.export.load` reads).
        model: takes the inputs in their order.
        inputs: examples by name, at least two of each.
        output: name of the output, for ONNX.

    Raises:
        ValueError: a package is missing, or the model cannot be folded.
    """
    if kind == "onnx":
        validation.require("export", "onnx", "onnxscript", "onnxruntime")
    plain = fold_batch_norm(model)
    batch = torch.export.Dim("batch")
    shapes = tuple({0: batch} for _ in inputs)
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "torch":
        torch.export.save(torch.export.export(plain, tuple(inputs.values()), dynamic_shapes=shapes), path)
        return
    with warnings.catch_warnings():
        # Two inputs of one batch size: the exporter says that it gives the name once.
        warnings.filterwarnings("ignore", message=".*axis name: batch will not be used")
        torch.onnx.export(
            plain, tuple(inputs.values()), path, input_names=list(inputs), output_names=[output], dynamo=True,
            dynamic_shapes=shapes, external_data=False, verbose=False,
        )  # fmt: skip


def read(path: pathlib.Path, kind: str, threads: int = 0) -> Callable[..., torch.Tensor]:
    """The program in a file as a function of tensors, run by ONNX Runtime (with so many threads) or torch.

    Raises:
        ValueError: a package is missing.
    """
    if kind == "torch":
        return torch.export.load(path).module()
    validation.require("export", "onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def run(*inputs: torch.Tensor) -> torch.Tensor:
        (output,) = session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})
        return torch.from_numpy(output)

    return run


@torch.no_grad()
def compare(
    program: Callable[..., torch.Tensor], model: nn.Module, inputs: Sequence[torch.Tensor], *, classes: bool
) -> dict[str, Any]:
    """How far the program is from the model, in eval mode, on all inputs [N, …] in batches.

    Returns:
        `inputs`, `max_abs_difference`, `largest_output`, with `classes` also `equal_predictions`.

    Raises:
        ValueError: the difference exceeds TOLERANCE of the largest output.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    count, difference, largest, equal = len(inputs[0]), 0.0, 0.0, 0
    for begin in range(0, count, _BATCH):
        part = [x[begin : begin + _BATCH] for x in inputs]
        expected, found = model(*part), program(*part)
        # A maximum that passes over NaN would hide it.
        difference = torch.maximum((found - expected).abs().amax(), torch.tensor(difference)).item()
        largest = max(largest, expected.abs().max().item())
        equal += (expected.argmax(1) == found.argmax(1)).sum().item() if classes else 0
    for module, training in modes:
        module.training = training
    if not difference <= TOLERANCE * largest:
        raise ValueError(
            f"the exported program differs from the network by {difference:.3g} where outputs reach {largest:.3g}; "
            f"at most {TOLERANCE:g} of that is rounding; do not use the file"
        )
    figures = {"inputs": count, "max_abs_difference": difference, "largest_output": largest}
    return figures | ({"equal_predictions": equal} if classes else {})


def versions(*packages: str) -> dict[str, str]:
    """Of the packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
