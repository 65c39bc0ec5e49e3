"""The two networks of a recipe or of a checkpoint, and their losses."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastcifar import models
from fastcifar.training.checkpoint import Checkpoint, CheckpointError
from fastcifar.training.options import Recipe


def build_gan(recipe: Recipe, num_classes: int) -> models.GAN:
    """The recipe's two networks with the weights of its seed, on the CPU.

    Raises:
        ValueError: an unknown model, option or implementation.
    """
    torch.manual_seed(recipe.seed)
    options = dict(recipe.model_options)
    if recipe.unconditional and "conditional" in models.model_options(recipe.model):
        options["conditional"] = False
    gan = models.create_model(recipe.model, num_classes=num_classes, **options)
    for module in gan.modules():
        if hasattr(module, "impl"):
            module.impl = recipe.impl
    return gan


def load_gan(saved: Checkpoint, recipe: Recipe, *, average: bool = True) -> tuple[models.GAN, tuple[str, ...]]:
    """The GAN of a checkpoint, in eval mode on the CPU, and its class names.

    Args:
        saved: of a GAN's run.
        recipe: that of the run.
        average: the generator's averaged weights, where the run kept any.

    Raises:
        CheckpointError: it holds a classifier.
    """
    if recipe.model not in models.list_models(gan=True):
        raise CheckpointError(
            f"{saved.path} holds the classifier {recipe.model}; generating needs the run of a GAN "
            f"({', '.join(models.list_models(gan=True))})"
        )
    names = saved.state.get("class_names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{saved.path} names no classes; the file is damaged")
    gan = build_gan(recipe, len(names))
    averaged = {n.removeprefix("ema."): t for n, t in saved.tensors.items() if n.startswith("ema.")}
    try:
        gan.load_state_dict({n.removeprefix("model."): t for n, t in saved.tensors.items() if n.startswith("model.")})
        if average and averaged:
            gan.generator.load_state_dict(averaged)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{saved.path} holds another network than its configuration says ({reason})") from error
    return gan.eval().requires_grad_(False), tuple(names)


def discriminator_loss(kind: str, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """The discriminator's loss of raw logits [n] of real and generated images; "hinge", "bce" or "nonsaturating"."""
    if kind == "hinge":
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    # Binary cross-entropy with logits; the non-saturating loss has the same discriminator.
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def generator_loss(kind: str, fake: torch.Tensor) -> torch.Tensor:
    """The generator's loss of the raw logits [n] of its images."""
    return -fake.mean() if kind in ("hinge", "aw_hinge") else F.softplus(-fake).mean()
