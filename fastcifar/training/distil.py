"""Distillation: what a trained classifier says of the same augmented images, and the loss that learns it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastcifar import data
from fastcifar.training.networks import trained_classifier


def distillation_loss(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """T² · KL(softmax(teacher / T) ‖ softmax(student / T)), the mean over a batch.

    Args:
        student, teacher: logits [N, classes], float32.
        temperature: T > 0; T² keeps the gradient's size about the same for every T.

    Source: Hinton, Vinyals and Dean, Distilling the knowledge in a neural network, 2015.
    """
    own, wanted = (F.log_softmax(logits / temperature, 1) for logits in (student, teacher))
    return temperature**2 * F.kl_div(own, wanted, reduction="batchmean", log_target=True)


class Teacher:
    """A trained classifier that answers for the images which its student sees.

    Args:
        path: its run or checkpoint; averaged weights are taken where it has them.
        dataset: that the student learns.
        device, amp_dtype, impl: of the student.
        holdout: training images that the student is judged by; a teacher that knows them is warned of.

    Attributes:
        digest: SHA-256 of its tensors.
        settings: what else its answers depend on, where that differs from the student's.

    Raises:
        ValueError: there is none, it is a GAN's, or it knows another number of classes.
    """

    def __init__(
        self,
        path: str,
        dataset: data.ImageDataset,
        device: torch.device,
        amp_dtype: torch.dtype,
        impl: str,
        *,
        holdout: int = 0,
    ):
        found = trained_classifier("--teacher", path, dataset, impl, holdout=holdout)
        self.digest = found.digest
        self._network = found.network.to(device=device, memory_format=torch.channels_last)
        self._amp_dtype = amp_dtype
        self._renormalise, self.settings = None, ""
        if (tuple(found.mean), tuple(found.std)) != (tuple(dataset.mean), tuple(dataset.std)):
            mean, std, own_mean, own_std = (
                torch.tensor(values, device=device).view(3, 1, 1)
                for values in (dataset.mean, dataset.std, found.mean, found.std)
            )
            self._renormalise = std / own_std, (mean - own_mean) / own_std
            self.settings = f"{found.mean}{found.std}"

    @torch.no_grad()
    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """Images [N, 3, H, W], normalised as the student's, to logits [N, classes], float32."""
        if self._renormalise is not None:
            scale, shift = self._renormalise
            images = torch.addcmul(shift, images.float(), scale).to(images.dtype)
        enabled = self._amp_dtype != torch.float32
        with torch.autocast(images.device.type, self._amp_dtype, enabled=enabled):
            return self._network(images).float()
