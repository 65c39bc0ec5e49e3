"""Where a classifier looks: Grad-CAM and integrated gradients by captum, and their picture."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy
import torch
from torch import nn

from fastcifar import validation
from fastcifar.folding import fold_batch_norm

_STEPS, _COLUMNS = 64, 4


class Explanation(NamedTuple):
    """Of N images: the predicted classes int64 [N] and their probabilities [N]; Grad-CAM's maps [N, H, W] in [0, 1]
    from the layer of that name; integrated gradients [N, 3, H, W] and how far their sums are from what they explain,
    as a share of that [N]."""

    predicted: torch.Tensor
    probability: torch.Tensor
    layer: str
    grad_cam: torch.Tensor
    integrated_gradients: torch.Tensor
    incompleteness: torch.Tensor


def map_layers(model: nn.Module, images: torch.Tensor) -> list[str]:
    """Names of the modules that give maps [N, C, h, w] of more than one pixel, in the order in which they do."""
    found: list[str] = []
    hooks = []
    for name, module in model.named_modules():
        if name:

            def note(module, inputs, output, name=name):
                if isinstance(output, torch.Tensor) and output.dim() == 4 and output.shape[2] * output.shape[3] > 1:
                    found.append(name)

            hooks.append(module.register_forward_hook(note))
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return found


def explain(model: nn.Module, images: torch.Tensor, layer: str | None = None) -> Explanation:
    """Explains the predicted class of each image.

    Args:
        model: a classifier; its copy with folded batch norm is what is explained.
        images: [N, 3, H, W], normalised, so that 0 (the data set's mean colour) is the baseline.
        layer: whose maps Grad-CAM weighs; None for the last.

    Raises:
        ValueError: captum is missing, or no such layer.

    Source: Selvaraju et al., Grad-CAM, 2017; Sundararajan, Taly and Yan, Axiomatic attribution for deep networks, 2017.
    """
    validation.require("explain", "captum")
    from captum.attr import IntegratedGradients, LayerAttribution, LayerGradCam

    plain = fold_batch_norm(model)
    layers = map_layers(plain, images[:1])
    if layer is None and not layers:
        raise ValueError("Grad-CAM needs a layer whose output is a map, this network has none")
    layer = layers[-1] if layer is None else validation.choose("--layer", layer, layers)
    with torch.no_grad():
        logits = plain(images)
    probability, predicted = logits.softmax(1).max(1)
    weighed = LayerGradCam(plain, plain.get_submodule(layer)).attribute(images, predicted, relu_attributions=True)
    maps = LayerAttribution.interpolate(weighed, tuple(images.shape[2:]), "bilinear").detach()[:, 0]
    gradients = IntegratedGradients(plain).attribute(images, target=predicted, n_steps=_STEPS, internal_batch_size=256)
    with torch.no_grad():
        explained = (logits - plain(torch.zeros_like(images[:1]))).gather(1, predicted[:, None])[:, 0]
    missing = (gradients.sum((1, 2, 3)) - explained).abs() / explained.abs()
    maps = maps / maps.amax((1, 2), keepdim=True).clamp_min(1e-12)
    return Explanation(predicted, probability, layer, maps, gradients.float().detach(), missing)


def draw(
    path: pathlib.Path, found: Explanation, images: numpy.ndarray, labels: Sequence[int], names: Sequence[str]
) -> None:
    """A PNG: beside each image uint8 [N, H, W, 3] Grad-CAM over it and the integrated gradients of each pixel.

    Raises:
        ValueError: matplotlib is missing.
    """
    try:
        from matplotlib import figure
    except ImportError as error:
        raise ValueError(f"{path.name} needs matplotlib ({error}); run `pip install matplotlib`") from error
    columns = min(_COLUMNS, len(images))
    rows = -(-len(images) // columns)
    sheet = figure.Figure(figsize=(3.6 * columns, 1.5 * rows + 0.5), layout="constrained")
    sheet.suptitle(
        f"image · Grad-CAM of {found.layer} · integrated gradients; class → predicted class, its probability",
        fontsize=9,
    )
    cells = numpy.atleast_1d(sheet.subfigures(rows, columns)).reshape(-1)
    strength = found.integrated_gradients.abs().sum(1)
    strength = strength / strength.flatten(1).quantile(0.99, 1).clamp_min(1e-12)[:, None, None]
    for place, cell in enumerate(cells[: len(images)]):
        true, predicted = names[labels[place]], names[found.predicted[place]]
        text = f"{true}" if true == predicted else f"{true} → {predicted}"
        colour = "darkgreen" if true == predicted else "firebrick"
        cell.suptitle(f"{text}  {100 * found.probability[place]:.0f} %", fontsize=8, color=colour)
        for kind, axes in enumerate(cell.subplots(1, 3)):
            axes.set_axis_off()
            if kind < 2:
                axes.imshow(images[place])
            if kind == 1:
                axes.imshow(found.grad_cam[place].numpy(), cmap="inferno", alpha=0.6, vmin=0, vmax=1)
            if kind == 2:
                axes.imshow(strength[place].numpy(), cmap="inferno", vmin=0, vmax=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.savefig(path, dpi=110)
