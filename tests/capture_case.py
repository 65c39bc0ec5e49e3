"""Tasks whose steps are captured, on a CPU and on a GPU."""

import torch

from fastcifar.training import distributed, recipe
from fastcifar.training.adversarial import Adversarial
from fastcifar.training.classify import Classification

_GAN = {"model_options": {"width": 4, "discriminator_width": 2, "latent_dim": 8}}
CASES = {
    "ds_resnet": {"model_options": {"width": 0.25}},
    "averaged, clipped, mixed": {
        "model_options": {"width": 0.25}, "model_ema_decay": 0.9, "clip_grad": 1.0, "mixup": 0.4, "opt": "adamw",
    },
    "dropout": {"model": "modify_resnet", "model_options": {"widths": [4, 4, 8, 8]}},
    "aw_sngan": {"model": "aw_sngan", "model_ema_decay": 0.9, **_GAN},
    "two steps, augmented": {"model": "aw_sngan", "n_dis": 2, "diffaugment": "color,translation,cutout", **_GAN},
    "dcgan": {"model": "dcgan", "model_options": {"width": 2, "latent_dim": 8}},
}  # fmt: skip


def make(dataset, device, **options):
    """A task of tiny networks; float32, eight images a step."""
    given = {"amp_dtype": "fp32", "batch_size": 8, "steps": 12, "device": str(device), **options}
    chosen = recipe.with_budget(recipe.resolve(given, has_gpu=False), len(dataset.train_images))
    gan = given.get("model") in ("aw_sngan", "dcgan")
    return (Adversarial if gan else Classification)(chosen, dataset, device, distributed.Processes())


def values_after(task, steps) -> dict[str, torch.Tensor]:
    """Copies of all tensors of the networks after so many steps."""
    for step in range(steps):
        task.train_step(step)
    return {name: value.clone() for name, value in task.network_tensors().items()}
