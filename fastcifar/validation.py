"""Checks of what users pass: every message names the values and the fix."""

from __future__ import annotations

import difflib
import importlib.util
import math
from collections.abc import Iterable, Sequence

import torch

ACTIVATIONS = ("none", "relu", "relu6", "leaky_relu", "silu", "hardswish")
IMPLEMENTATIONS = ("auto", "triton", "native", "reference")


def nearest_match(name: str, choices: Iterable[str]) -> str | None:
    """The choice that `name` most probably meant, or None when nothing is near."""
    lowered = {choice.lower(): choice for choice in choices}
    found = difflib.get_close_matches(str(name).lower(), list(lowered), n=1, cutoff=0.6)
    return lowered[found[0]] if found else None


def choose(kind: str, name: str, choices: Iterable[str]) -> str:
    """Returns `name` when it is one of `choices`.

    Raises:
        ValueError: otherwise; the message holds the nearest match and all choices.
    """
    choices = list(choices)
    if name in choices:
        return name
    near = nearest_match(name, choices)
    hint = f"; did you mean {near!r}?" if near else ""
    raise ValueError(f"unknown {kind} {name!r}{hint} (choose from: {', '.join(choices)})")


def require(extra: str, *packages: str) -> None:
    """Checks that the packages of an optional part are installed.

    Raises:
        ValueError: the first that is missing, and the line that installs it.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"{package} is not installed; run `pip install 'fastcifar[{extra}]'`")


def pair(operator: str, name: str, value: int | Sequence[int], *, minimum: int) -> tuple[int, int]:
    """An int or a pair of ints as (height, width), each at least `minimum`."""
    values = (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, (tuple, list)) else ()
    if len(values) != 2 or any(isinstance(v, bool) or not isinstance(v, int) or v < minimum for v in values):
        raise ValueError(f"{operator}: {name} must be an int or a pair of ints, each ≥ {minimum}, got {value!r}")
    return values


def output_size(
    size: tuple[int, int],
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[int, int]:
    """Height and width of a convolution's output; values below 1 mean that the kernel does not fit."""
    height, width = (
        (s + 2 * p - d * (k - 1) - 1) // t + 1
        for s, k, t, p, d in zip(size, kernel_size, stride, padding, dilation, strict=True)
    )
    return height, width


def check_vectors(operator: str, channels: int, like: torch.Tensor, **vectors: torch.Tensor | None) -> None:
    """Each given tensor must be floating point, of shape [channels], on the device of `like`."""
    for name, vector in vectors.items():
        if vector is None:
            continue
        if not isinstance(vector, torch.Tensor):
            raise TypeError(f"{operator}: {name} must be a tensor or None, got {type(vector).__name__}")
        if vector.shape != (channels,):
            raise ValueError(
                f"{operator}: {name} must have shape ({channels},) for an input of {channels} channels, "
                f"got {tuple(vector.shape)}"
            )
        if not vector.is_floating_point():
            raise TypeError(f"{operator}: {name} must be floating point, got {vector.dtype}")
        if vector.device != like.device:
            raise ValueError(f"{operator}: {name} is on {vector.device} but the input is on {like.device}")


def check_batch_norm_options(
    operator: str,
    *,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    training: bool,
    activation: str,
    negative_slope: float,
    momentum: float,
    eps: float,
) -> None:
    """Options that all operators with batch normalisation and an activation share."""
    if (running_mean is None) != (running_var is None):
        missing = "running_mean" if running_mean is None else "running_var"
        raise ValueError(f"{operator}: running_mean and running_var go together, but {missing} is None")
    if not training and running_mean is None:
        raise ValueError(f"{operator}: training=False needs running_mean and running_var, got None")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{operator}: {_unknown('activation', activation, ACTIVATIONS)}")
    if not abs(negative_slope) < math.inf:
        raise ValueError(f"{operator}: negative_slope must be finite, got {negative_slope!r}")
    if not 0.0 <= momentum <= 1.0:
        raise ValueError(f"{operator}: momentum must lie in [0, 1], got {momentum!r}")
    if not eps > 0.0:
        raise ValueError(f"{operator}: eps must be > 0, got {eps!r}")


def _unknown(kind: str, name: str, choices: Sequence[str]) -> str:
    try:
        choose(kind, name, choices)
    except ValueError as error:
        return str(error)
    raise AssertionError(f"{name} is a known {kind}")


def check_implementation(operator: str, impl: str) -> None:
    """`impl` must be one of `IMPLEMENTATIONS`."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"{operator}: {_unknown('impl', impl, IMPLEMENTATIONS)}")


def check_training_size(operator: str, channels: int, values_per_channel: int, size: Sequence[int]) -> None:
    """Batch statistics of one value have no variance: the same refusal, in the same words, as torch's."""
    if values_per_channel == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {list(size)}")


def _check_tensors(operator: str, **tensors: torch.Tensor) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{operator}: {name} must be a tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{operator}: {name} must be floating point, got {tensor.dtype}")


def check_normalised(operator: str, x: torch.Tensor, residual: torch.Tensor | None, *, autocast: bool) -> None:
    """An input of batch normalisation, and what is added to the result."""
    _check_tensors(operator, x=x)
    if x.dim() < 2:
        raise ValueError(f"{operator}: x must have shape (N, C, …), got {tuple(x.shape)}")
    if residual is None:
        return
    _check_tensors(operator, residual=residual)
    if residual.shape != x.shape:
        raise ValueError(
            f"{operator}: residual must have the shape of x, {tuple(x.shape)}, got {tuple(residual.shape)}"
        )
    if residual.device != x.device:
        raise ValueError(f"{operator}: residual is on {residual.device} but x is on {x.device}; move one of them")
    if residual.dtype != x.dtype and not autocast:
        raise TypeError(
            f"{operator}: x and residual must have the same dtype outside autocast, got {x.dtype} and {residual.dtype}"
        )


def check_depthwise(
    operator: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[int, int]:
    """Shapes, dtypes and devices of a depthwise convolution; returns the output's (height, width)."""
    _check_tensors(operator, x=x, weight=weight)
    if x.dim() != 4:
        raise ValueError(f"{operator}: x must have shape (N, C, H, W), got {tuple(x.shape)}")
    channels = x.shape[1]
    if weight.dim() != 4 or weight.shape[:2] != (channels, 1) or 0 in weight.shape[2:]:
        raise ValueError(
            f"{operator}: weight must have shape ({channels}, 1, K, K) for an input of {channels} channels, "
            f"got {tuple(weight.shape)}"
        )
    if weight.device != x.device:
        raise ValueError(f"{operator}: weight is on {weight.device} but x is on {x.device}; move one of them")
    size = output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    if min(size) < 1:
        raise ValueError(
            f"{operator}: a {tuple(weight.shape[2:])} kernel with dilation {dilation} does not fit an input of "
            f"{tuple(x.shape[2:])} with padding {padding}; enlarge the padding or the input"
        )
    return size


def check_spectral(
    operator: str,
    weights: Sequence[torch.Tensor],
    us: Sequence[torch.Tensor],
    vs: Sequence[torch.Tensor],
    *,
    n_power_iterations: int,
    eps: float,
) -> None:
    """Weights and their singular vectors, one of each a layer."""
    if not len(weights) == len(us) == len(vs) > 0:
        raise ValueError(
            f"{operator}: weights, us and vs must have one tensor each a layer, got {len(weights)}, {len(us)} and "
            f"{len(vs)}"
        )
    iterations_ok = isinstance(n_power_iterations, int) and not isinstance(n_power_iterations, bool)
    if not iterations_ok or n_power_iterations < 0:
        raise ValueError(f"{operator}: n_power_iterations must be an int ≥ 0, got {n_power_iterations!r}")
    if not eps > 0.0:
        raise ValueError(f"{operator}: eps must be > 0, got {eps!r}")
    for index, (weight, u, v) in enumerate(zip(weights, us, vs, strict=True)):
        _check_tensors(operator, **{f"weights[{index}]": weight, f"us[{index}]": u, f"vs[{index}]": v})
        if weight.dim() < 2 or weight.numel() == 0:
            raise ValueError(
                f"{operator}: weights[{index}] must have at least two dimensions and one element, "
                f"got {tuple(weight.shape)}"
            )
        if weight.device != weights[0].device:
            raise ValueError(
                f"{operator}: weights[{index}] is on {weight.device} but weights[0] is on {weights[0].device}; "
                "move one of them"
            )
        check_singular_vectors(operator, f"weights[{index}]", weight, 0, **{f"us[{index}]": u, f"vs[{index}]": v})


def check_singular_vectors(operator: str, name: str, weight: torch.Tensor, dim: int, **vectors: torch.Tensor) -> None:
    """u and v, in this order, of the weight called `name`, whose rows lie along `dim`."""
    rows = weight.shape[dim]
    dtype = torch.promote_types(weight.dtype, torch.float32)
    for (label, vector), size in zip(vectors.items(), (rows, weight.numel() // rows), strict=True):
        if vector.shape != (size,):
            raise ValueError(
                f"{operator}: {label} must have shape ({size},) for a weight of {tuple(weight.shape)}, "
                f"got {tuple(vector.shape)}"
            )
        if vector.dtype != dtype:
            raise TypeError(f"{operator}: {label} must be {dtype} for a weight of {weight.dtype}, got {vector.dtype}")
        if vector.device != weight.device:
            raise ValueError(f"{operator}: {label} is on {vector.device} but {name} is on {weight.device}; move one")


def check_augmentation(
    operator: str,
    *,
    crop_pad: int,
    crop_mode: str,
    color_jitter: float,
    cutout: int,
    mixup: float,
    cutmix: float,
    size: tuple[int, int] | None = None,
) -> None:
    """Options of the augmentations; with the images' size also what depends on it."""
    if crop_mode not in ("reflect", "zero"):
        raise ValueError(f"{operator}: {_unknown('crop_mode', crop_mode, ('reflect', 'zero'))}")
    for name, value in (("crop_pad", crop_pad), ("cutout", cutout)):
        if not isinstance(value, int) or not 0 <= value < 1 << 30:
            raise ValueError(f"{operator}: {name} must be a whole number of pixels in [0, 2^30), got {value!r}")
    if not 0.0 <= color_jitter <= 1.0:
        raise ValueError(f"{operator}: color_jitter must lie in [0, 1], got {color_jitter!r}")
    for name, value in (("mixup", mixup), ("cutmix", cutmix)):
        if not 0.0 <= value < math.inf:
            raise ValueError(f"{operator}: {name} must be ≥ 0 and finite, got {value!r}")
    if mixup and cutmix:
        raise ValueError(f"{operator}: mixup and cutmix exclude each other; set one of them to 0")
    if size is not None and crop_mode == "reflect" and crop_pad >= min(size):
        raise ValueError(f"{operator}: crop_pad {crop_pad} must be below the image size {tuple(size)} to reflect")


def check_augment(
    operator: str,
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
    dtype: torch.dtype,
) -> None:
    """What an augmented batch is made of: tensors, draws, range of positions."""
    if images.dim() != 4 or images.shape[3] != 3 or images.dtype != torch.uint8 or images.numel() == 0:
        raise ValueError(f"{operator}: images must be uint8 (N, H, W, 3), got {images.dtype} {tuple(images.shape)}")
    if not images.is_contiguous():
        raise ValueError(f"{operator}: images must be contiguous, once for all calls: images = images.contiguous()")
    if images.shape[1] * images.shape[2] >= 1 << 28:
        raise ValueError(f"{operator}: an image must have fewer than 2^28 pixels, got {tuple(images.shape[1:3])}")
    if indices.dim() != 1 or indices.dtype != torch.int64:
        raise ValueError(f"{operator}: indices must be int64 (B,), got {indices.dtype} {tuple(indices.shape)}")
    tensors = {"indices": indices}
    if flips is not None:
        tensors["flips"] = flips
        if random_flip:
            raise ValueError(f"{operator}: flips are given, so random_flip must be False")
        if flips.shape != indices.shape or flips.dtype != torch.bool:
            raise ValueError(
                f"{operator}: flips must be bool ({len(indices)},) like indices, got {flips.dtype} {tuple(flips.shape)}"
            )
    if isinstance(step, torch.Tensor):
        tensors["step"] = step
        if step.numel() != 1 or step.dtype != torch.int64:
            raise ValueError(
                f"{operator}: a step on the device must be one int64 number, got {step.dtype} {tuple(step.shape)}"
            )
    for name, value in (("step", 0 if isinstance(step, torch.Tensor) else step), ("seed", seed)):
        if not 0 <= value < 1 << 63:
            raise ValueError(f"{operator}: {name} must lie in [0, 2^63), got {value!r}")
    if first < 0 or count < 0 or first + count > len(indices):
        raise ValueError(
            f"{operator}: positions {first} … {first + count} are not within the {len(indices)} indices of the batch"
        )
    if len(mean) != 3 or len(std) != 3 or not all(math.isfinite(m) and s > 0 for m, s in zip(mean, std, strict=True)):
        raise ValueError(f"{operator}: mean and std must be three numbers each, std > 0, got {mean!r} and {std!r}")
    if not dtype.is_floating_point:
        raise TypeError(f"{operator}: dtype must be floating point, got {dtype}")
    for name, tensor in tensors.items():
        if tensor.device != images.device:
            raise ValueError(f"{operator}: {name} is on {tensor.device} but images is on {images.device}")
