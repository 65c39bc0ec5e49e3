"""Augmented batches by kernels: one operator, its fake kernel; nothing here is differentiable."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastcifar import native
from fastcifar.ops.batch_norm_native import DTYPES
from fastcifar.ops.registration import on_device_of
from fastcifar.profiling import annotated
from fastcifar.reference_augment import beta_table, normalisation

_LIBRARY = torch.library.Library("fastcifar", "FRAGMENT")
_LIBRARY.define(
    "augment(Tensor images, Tensor indices, Tensor? flips, Tensor? device_step, SymInt step, int seed, SymInt first, "
    "SymInt count, float[] mean, float[] std, bool random_flip, int crop_pad, str crop_mode, float color_jitter, "
    "int cutout, float mixup, float cutmix, ScalarType dtype, str impl) -> (Tensor, Tensor, Tensor)"
)


def _results(images, count, mixing, dtype):
    """Images, partners' indices and their shares."""
    made = images.new_empty((count, *images.shape[1:]), dtype=dtype)
    partners = images.new_empty(count if mixing else 0, dtype=torch.int64)
    return made.permute(0, 3, 1, 2), partners, images.new_empty(partners.shape, dtype=torch.float32)


def _native(
    images, indices, flips, device_step, step, seed, first, count, mean, std, random_flip, crop_pad, crop_mode,
    color_jitter, cutout, mixup, cutmix, dtype,
):  # fmt: skip
    results = _results(images, count, mixup or cutmix, dtype)
    indices, flips = indices.contiguous(), None if flips is None else flips.contiguous()
    table = beta_table(mixup or cutmix) if mixup or cutmix else None
    step = step if device_step is None else device_step.item()
    scale, shift = normalisation(mean, std)
    native.module().augment(
        (images.data_ptr(), *images.shape[:3]),
        (indices.data_ptr(), 0 if flips is None else flips.data_ptr(), len(indices), first, count),
        (
            step, seed, crop_pad, crop_mode == "reflect", random_flip, color_jitter, cutout,
            1 if mixup else 2 if cutmix else 0, 0 if table is None else table.data_ptr(), scale, shift,
        ),
        (DTYPES[dtype], *(tensor.data_ptr() for tensor in results)),
        torch.get_num_threads(),
    )  # fmt: skip
    return results


def _triton(
    images, indices, flips, device_step, step, seed, first, count, mean, std, random_flip, crop_pad, crop_mode,
    color_jitter, cutout, mixup, cutmix, dtype,
):  # fmt: skip
    from fastcifar.kernels.triton import augment_launch

    results = _results(images, count, mixup or cutmix, dtype)
    scale, shift = normalisation(mean, std)
    with on_device_of(images):
        augment_launch.augment(
            images, indices.contiguous(), None if flips is None else flips.contiguous(),
            step if device_step is None else device_step, results, seed=seed, first=first, scale=scale, shift=shift,
            random_flip=random_flip, crop_pad=crop_pad, reflect=crop_mode == "reflect", color_jitter=color_jitter,
            cutout=cutout, mixing="mixup" if mixup else "cutmix" if cutmix else "none",
            beta_table=beta_table(mixup or cutmix, images.device) if mixup or cutmix else None,
        )  # fmt: skip
    return results


_RUN = {"native": _native, "triton": _triton}


@annotated("augment")
def _augment(images, *arguments):
    *arguments, impl = arguments
    return _RUN[impl](images, *arguments)


for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("augment", _augment, _key)


@torch.library.register_fake("fastcifar::augment", lib=_LIBRARY)
def _fake(
    images, indices, flips, device_step, step, seed, first, count, mean, std, random_flip, crop_pad, crop_mode,
    color_jitter, cutout, mixup, cutmix, dtype, impl,
):  # fmt: skip
    return _results(images, count, mixup or cutmix, dtype)


def augment(
    images: torch.Tensor,
    indices: torch.Tensor,
    *,
    step: int | torch.Tensor,
    seed: int,
    mean: Sequence[float],
    std: Sequence[float],
    first: int,
    count: int,
    flips: torch.Tensor | None,
    random_flip: bool,
    crop_pad: int,
    crop_mode: str,
    color_jitter: float,
    cutout: int,
    mixup: float,
    cutmix: float,
    dtype: torch.dtype,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The operator on kernels ("triton" or "native"); arguments and results as in `fastcifar.functional.augment`."""
    on_device = isinstance(step, torch.Tensor)
    made, partners, weight = torch.ops.fastcifar.augment(
        images, indices, flips, step if on_device else None, 0 if on_device else step, seed, first, count, mean, std,
        random_flip, crop_pad, crop_mode, color_jitter, cutout, mixup, cutmix, dtype, impl,
    )  # fmt: skip
    return (made, partners, weight) if mixup or cutmix else (made, None, None)
