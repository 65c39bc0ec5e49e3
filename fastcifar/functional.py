"""The documented functions: validate, apply the autocast policy, choose an implementation, call it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from fastcifar import dispatch, validation


def _autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return None


def _autocast(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Under autocast the convolution's operands take its dtype; batch norm's parameters and statistics do not."""
    dtype = _autocast_dtype(x)
    if dtype is not None:
        return x.to(dtype), weight.to(dtype)
    if x.dtype != weight.dtype:
        raise TypeError(
            f"depthwise_conv_bn_act: x and weight must have the same dtype outside autocast, "
            f"got {x.dtype} and {weight.dtype}"
        )
    return x, weight


def depthwise_conv_bn_act(
    x: torch.Tensor,
    weight: torch.Tensor,
    bn_weight: torch.Tensor | None,
    bn_bias: torch.Tensor | None,
    running_mean: torch.Tensor | None = None,
    running_var: torch.Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    activation: str = "relu",
    negative_slope: float = 0.01,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    process_group: dist.ProcessGroup | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Depthwise convolution, batch normalisation and activation as one operator.

    Equal to `act(batch_norm(conv2d(x, weight, None, stride, padding, dilation, groups=C), running_mean, running_var,
    bn_weight, bn_bias, training, momentum, eps))`, the running buffers updated in place as `F.batch_norm` does (with
    the unbiased variance). Under autocast `x` and `weight` take the autocast dtype, everything else stays as it is.

    Args:
        x: [N, C, H, W], floating point; channels-last is the fast layout.
        weight: [C, 1, KH, KW], the dtype of `x` (any, under autocast).
        bn_weight, bn_bias: γ and β, [C], or None for 1 and 0.
        running_mean, running_var: [C]; both or neither. Needed when `training` is False.
        stride, padding, dilation: in pixels, an int or (height, width).
        activation: "none", "relu", "relu6", "leaky_relu", "silu" or "hardswish".
        negative_slope: the slope of leaky_relu for negative values.
        training: normalise by the statistics of this batch, instead of the running ones.
        momentum: weight of the new statistics in the running ones, in [0, 1].
        eps: added to the variance.
        process_group: with `training`, take the statistics over all ranks of this group.
        impl: "auto" takes the best implementation that can run; a name ("triton", "native", "reference") runs that
            one or raises. `fastcifar.dispatch.explain()` tells which runs.

    Returns:
        [N, C, H', W'] in the dtype of `x` (autocast's under autocast).

    Raises:
        ValueError: shapes, devices or options that do not fit, or a single value per channel in training.
        TypeError: tensors that are not floating point, or of different dtypes.
        RuntimeError: the named `impl` cannot run this call.

    Source: Howard et al., MobileNets, 2017 (the block); Ioffe and Szegedy, Batch Normalization, 2015.
    """
    name = "depthwise_conv_bn_act"
    stride = validation.pair(name, "stride", stride, minimum=1)
    padding = validation.pair(name, "padding", padding, minimum=0)
    dilation = validation.pair(name, "dilation", dilation, minimum=1)
    validation.check_implementation(name, impl)
    height, width = validation.check_depthwise(name, x, weight, stride, padding, dilation)
    channels = x.shape[1]
    validation.check_vectors(
        name, channels, x, bn_weight=bn_weight, bn_bias=bn_bias, running_mean=running_mean, running_var=running_var
    )
    validation.check_batch_norm_options(
        name,
        running_mean=running_mean,
        running_var=running_var,
        training=training,
        activation=activation,
        negative_slope=negative_slope,
        momentum=momentum,
        eps=eps,
    )
    if training and process_group is None:
        values = x.shape[0] * height * width
        validation.check_training_size(name, channels, values, (x.shape[0], channels, height, width))
    x, weight = _autocast(x, weight)
    call = dispatch.Call(device=x.device, dtype=x.dtype, kernel_size=tuple(weight.shape[2:]), training=training)
    run = dispatch.select(name, impl, call)
    return run(
        x,
        weight,
        bn_weight,
        bn_bias,
        running_mean,
        running_var,
        stride=stride,
        padding=padding,
        dilation=dilation,
        activation=activation,
        negative_slope=negative_slope,
        training=training,
        momentum=momentum,
        eps=eps,
        process_group=process_group,
    )


def batch_norm_act(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor | None = None,
    running_var: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    activation: str = "relu",
    negative_slope: float = 0.01,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    process_group: dist.ProcessGroup | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Batch normalisation, addition of a residual and activation as one operator.

    Equal to `act(batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps) + residual)`, the
    running buffers updated in place as `F.batch_norm` does. Under autocast a residual of another dtype takes that of
    `x`.

    Args:
        x: [N, C, *], floating point; channels-last is the fast layout.
        weight, bias: γ and β, [C], or None for 1 and 0.
        running_mean, running_var: [C]; both or neither. Needed when `training` is False.
        residual: the shape and dtype of `x`, or None.
        activation, negative_slope, training, momentum, eps, process_group, impl: as in `depthwise_conv_bn_act`.

    Returns:
        The shape and dtype of `x`.

    Raises:
        ValueError, TypeError, RuntimeError: as `depthwise_conv_bn_act`.

    Source: Ioffe and Szegedy, Batch Normalization, 2015; He et al., Deep Residual Learning, 2016.
    """
    name = "batch_norm_act"
    validation.check_implementation(name, impl)
    validation.check_normalised(name, x, residual, autocast=_autocast_dtype(x) is not None)
    channels = x.shape[1]
    validation.check_vectors(
        name, channels, x, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var
    )
    validation.check_batch_norm_options(
        name,
        running_mean=running_mean,
        running_var=running_var,
        training=training,
        activation=activation,
        negative_slope=negative_slope,
        momentum=momentum,
        eps=eps,
    )
    if training and process_group is None:
        validation.check_training_size(name, channels, x.numel() // max(channels, 1), x.shape)
    if residual is not None:
        residual = residual.to(x.dtype)
    run = dispatch.select(name, impl, dispatch.Call(device=x.device, dtype=x.dtype, training=training))
    return run(
        x,
        weight,
        bias,
        running_mean,
        running_var,
        residual,
        activation=activation,
        negative_slope=negative_slope,
        training=training,
        momentum=momentum,
        eps=eps,
        process_group=process_group,
    )


def spectral_normalize(
    weights: Sequence[torch.Tensor],
    us: Sequence[torch.Tensor],
    vs: Sequence[torch.Tensor],
    *,
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    impl: str = "auto",
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Spectral normalisation of many weights at once, whatever their number and shapes.

    Each weight is a matrix W [H, W'] = `weight.flatten(1)`. A power iteration is u ← W v/|W v|, v ← Wᵀu/|Wᵀu| (norms
    at least `eps`, as in `F.normalize`); then σ = uᵀW v and the result is W/σ, as
    `torch.nn.utils.parametrizations.spectral_norm` has it. Differentiable with respect to the weights, u and v are
    constants: dW = (dW̄ − ⟨dW̄, W/σ⟩·u vᵀ)/σ. Autocast does not apply.

    Args:
        weights: each [H, …] of at least two dimensions, floating point, any strides; all on one device. Rows that lie
            along another dimension come to the front by `weight.movedim(dim, 0)`.
        us: [H] for each weight, in float32 (float64 for float64 weights).
        vs: [W'] for each weight, likewise.
        n_power_iterations: 0 takes u and v as they are.
        eps: the least norm that u and v are divided by.
        impl: "auto" takes the best implementation that can run; a name ("triton", "native", "reference") runs that
            one or raises.

    Returns:
        Lists of W/σ (shapes and dtypes of the weights), u, v (new tensors where iterated) and σ ([]).

    Raises:
        ValueError: lists of different lengths, shapes or devices that do not fit, options out of range.
        TypeError: something that is no tensor, or of the wrong dtype.
        RuntimeError: the named `impl` cannot run this call.

    Source: Miyato et al., Spectral Normalization for Generative Adversarial Networks, 2018, algorithm 1.
    """
    name = "spectral_normalize"
    validation.check_implementation(name, impl)
    weights, us, vs = list(weights), list(us), list(vs)
    validation.check_spectral(name, weights, us, vs, n_power_iterations=n_power_iterations, eps=eps)
    by_dtype: dict[torch.dtype, list[int]] = {}
    for index, weight in enumerate(weights):
        by_dtype.setdefault(weight.dtype, []).append(index)
    results = tuple([None] * len(weights) for _ in range(4))
    for dtype, chosen in by_dtype.items():
        run = dispatch.select(name, impl, dispatch.Call(device=weights[0].device, dtype=dtype))
        parts = run(
            *([values[i] for i in chosen] for values in (weights, us, vs)),
            n_power_iterations=n_power_iterations,
            eps=eps,
        )
        for whole, part in zip(results, parts, strict=True):
            for index, value in zip(chosen, part, strict=True):
                whole[index] = value
    return results


def augment(
    images: torch.Tensor,
    indices: torch.Tensor,
    *,
    step: int | torch.Tensor,
    seed: int,
    mean: Sequence[float],
    std: Sequence[float],
    first: int = 0,
    count: int | None = None,
    flips: torch.Tensor | None = None,
    random_flip: bool = False,
    crop_pad: int = 0,
    crop_mode: str = "reflect",
    color_jitter: float = 0.0,
    cutout: int = 0,
    mixup: float = 0.0,
    cutmix: float = 0.0,
    dtype: torch.dtype = torch.float32,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """A batch of augmented, normalised images out of a set of bytes, or one rank's part of it.

    Crop, flip, colour jitter, normalisation, cutout, then mixup or cutmix with the image some places further along the
    batch. Every draw is a pure function of (seed, step, position in the batch), by Philox4x32-10.

    Args:
        images: uint8 [N, H, W, 3], contiguous: the whole set.
        indices: int64 [B], in [0, N): the images of the batch. One out of range raises on a CPU and on a GPU gives an
            image of NaN (triton) or a device-side assertion (reference).
        step: in [0, 2⁶³), or one int64 number on the device, so that a captured CUDA graph can advance it.
        seed: in [0, 2⁶³).
        mean, std: of each channel, of values in [0, 1].
        first, count: the positions to make; by default all B.
        flips: bool [B], which images to mirror; or `random_flip`, half of them.
        crop_pad, crop_mode, color_jitter, cutout, mixup, cutmix: as in `fastcifar.data.Augmentation`.
        dtype: of the result; computed in float32 (by the reference in float64 for float64).
        impl: "auto" takes the best implementation that can run; a name ("triton", "native", "reference") runs that
            one or raises.

    Returns:
        The images [count, 3, H, W], channels-last; with mixup or cutmix the indices of their partners, int64 [count],
        and the partners' share of the targets, float32 [count], else None and None.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or options that do not fit.
        RuntimeError: the named `impl` cannot run this call.
    """
    name = "augment"
    validation.check_implementation(name, impl)
    count = len(indices) - first if count is None else count
    validation.check_augment(
        name, images, indices, step=step, seed=seed, mean=mean, std=std, first=first, count=count, flips=flips,
        random_flip=random_flip, dtype=dtype,
    )  # fmt: skip
    options = {"crop_pad": crop_pad, "crop_mode": crop_mode, "color_jitter": color_jitter, "cutout": cutout}
    options |= {"mixup": mixup, "cutmix": cutmix}
    validation.check_augmentation(name, **options, size=images.shape[1:3])
    run = dispatch.select(name, impl, dispatch.Call(device=images.device, dtype=dtype))
    return run(
        images, indices, step=step, seed=seed, mean=mean, std=std, first=first, count=count, flips=flips,
        random_flip=random_flip, dtype=dtype, **options,
    )  # fmt: skip
