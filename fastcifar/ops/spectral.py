"""Spectral normalisation by kernels, all weights at once: operators, fake kernels, autograd.

Forward saves W/σ, u, v and σ, backward needs nothing else. The operators are functional: advanced vectors are
returned; `advance` alone, which no graph records, writes them in place.
"""

from __future__ import annotations

import atexit
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fastcifar import native
from fastcifar.ops.registration import on_device_of
from fastcifar.ops.spectral_layout import Layout, arrange, arrange_contiguous, dense
from fastcifar.profiling import annotated

_LIBRARY = torch.library.Library("fastcifar", "FRAGMENT")
_LIBRARY.define(
    "spectral_normalize(Tensor[] weights, Tensor[] us, Tensor[] vs, int n_power_iterations, float eps, str impl) -> "
    "(Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "spectral_gradient(Tensor?[] gradients, Tensor normalised, Tensor vectors, Tensor sigmas, SymInt[] table, "
    "str impl) -> Tensor"
)


def _addresses(tensors: Sequence[torch.Tensor | None]) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


@functools.lru_cache(maxsize=256)
def _native_batch(table: tuple[int, ...]) -> Any:
    return native.module().SpectralBatch(list(table))


# Before the module goes, so that it does not report them as leaked.
atexit.register(_native_batch.cache_clear)


# Never dropped: captured graphs hold the addresses of its tensors.
@functools.cache
def _triton_batch(table: tuple[int, ...], device: torch.device) -> Any:
    from fastcifar.kernels.triton.spectral_launch import Batch

    return Batch(table, device)


@annotated("spectral_normalize")
def _normalize_native(table, weights, us, vs, new_us, new_vs, results, n_power_iterations, eps):
    lists = [_addresses(tensors) for tensors in (weights, us, vs, new_us, new_vs)]
    size, threads = results[0].element_size(), torch.get_num_threads()
    _native_batch(table).normalize(*lists, *_addresses(results), size, n_power_iterations, eps, threads)


@annotated("spectral_normalize")
def _normalize_triton(table, weights, us, vs, new_us, new_vs, results, n_power_iterations, eps):
    batch = _triton_batch(table, results[0].device)
    with on_device_of(results[0]):
        batch.normalize(weights, us, vs, new_us, new_vs, *results, n_power_iterations=n_power_iterations, eps=eps)


@annotated("spectral_gradient")
def _gradient_native(table, gradients, normalised, vectors, sigmas, result):
    tensors = _addresses([normalised, vectors, sigmas, result])
    _native_batch(table).gradient(_addresses(gradients), *tensors, result.element_size(), torch.get_num_threads())


@annotated("spectral_gradient")
def _gradient_triton(table, gradients, normalised, vectors, sigmas, result):
    with on_device_of(result):
        _triton_batch(table, result.device).gradient(gradients, normalised, vectors, sigmas, result)


_NORMALIZE = {"native": _normalize_native, "triton": _normalize_triton}
_GRADIENT = {"native": _gradient_native, "triton": _gradient_triton}


def _results(layout: Layout, like: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """W/σ of all weights, all u and v (v in memory order), all σ."""
    return [
        like.new_empty(layout.normalised),
        like.new_empty(layout.vectors, dtype=dtype),
        like.new_empty(len(layout.views), dtype=dtype),
    ]


def _normalize(weights, us, vs, n_power_iterations, eps, impl):
    weights, layout = arrange(weights, [0] * len(weights))
    results = _results(layout, weights[0], us[0].dtype)
    advanced = layout.advanced(us[0]) if n_power_iterations else us[0].new_empty(0)
    new_us, new_vs = layout.split_vectors(advanced) if n_power_iterations else (us, vs)
    _NORMALIZE[impl](layout.table, weights, us, vs, new_us, new_vs, results, n_power_iterations, eps)
    normalised, vectors, sigmas = results
    return normalised, vectors, advanced, sigmas


def _gradient(gradients, normalised, vectors, sigmas, table, impl):
    result = torch.empty_like(normalised)
    _GRADIENT[impl](tuple(table), gradients, normalised, vectors, sigmas, result)
    return result


for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("spectral_normalize", _normalize, _key)
    _LIBRARY.impl("spectral_gradient", _gradient, _key)


@torch.library.register_fake("fastcifar::spectral_normalize", lib=_LIBRARY)
def _fake_normalize(weights, us, vs, n_power_iterations, eps, impl):
    _, layout = arrange_contiguous(weights)
    normalised, vectors, sigmas = _results(layout, weights[0], us[0].dtype)
    return normalised, vectors, layout.advanced(us[0]) if n_power_iterations else us[0].new_empty(0), sigmas


@torch.library.register_fake("fastcifar::spectral_gradient", lib=_LIBRARY)
def _fake_gradient(gradients, normalised, vectors, sigmas, table, impl):
    return torch.empty_like(normalised)


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, n_power_iterations, eps, impl, *tensors):
        count = len(tensors) // 3
        weights = list(tensors[:count])
        if torch.compiler.is_compiling():
            weights, layout = arrange_contiguous(weights)
        else:
            weights, layout = arrange(weights, [0] * count)
        us, vs = tensors[count : 2 * count], tensors[2 * count :]
        normalised, vectors, advanced, sigmas = torch.ops.fastcifar.spectral_normalize(
            weights, us, vs, n_power_iterations, eps, impl
        )
        ctx.save_for_backward(normalised, vectors, sigmas)
        ctx.layout, ctx.impl = layout, impl
        ctx.set_materialize_grads(False)
        new_us, new_vs = layout.split_vectors(advanced) if n_power_iterations else ([], [])
        constants = [*new_us, *new_vs, *sigmas.unbind()]
        ctx.mark_non_differentiable(*constants)
        return *layout.split_normalised(normalised), *constants

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        count = len(ctx.layout.views)
        gradients = _dense_gradients(ctx.layout, gradients[:count])
        result = torch.ops.fastcifar.spectral_gradient(gradients, *ctx.saved_tensors, ctx.layout.table, ctx.impl)
        return None, None, None, *_split_gradients(ctx.layout, gradients, result), *[None] * (2 * count)


def _dense_gradients(layout, gradients):
    return [
        None if gradient is None else dense(gradient, strides)
        for gradient, (_, strides, _) in zip(gradients, layout.views, strict=True)
    ]


def _split_gradients(layout, gradients, result):
    return [
        None if gradient is None else result.as_strided(*view)
        for gradient, view in zip(gradients, layout.views, strict=True)
    ]


def spectral_normalize(
    weights: Sequence[torch.Tensor],
    us: Sequence[torch.Tensor],
    vs: Sequence[torch.Tensor],
    *,
    n_power_iterations: int,
    eps: float,
    impl: str,
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """The operator on kernels ("triton" or "native"), for weights of one dtype; shapes as in
    `fastcifar.functional.spectral_normalize`."""
    count = len(weights)
    vectors = [vector.contiguous() for vector in (*us, *vs)]
    results = _Normalize.apply(n_power_iterations, eps, impl, *weights, *vectors)
    normalised, sigmas = list(results[:count]), list(results[-count:])
    if n_power_iterations == 0:
        return normalised, list(us), list(vs), sigmas
    return normalised, list(results[count : 2 * count]), list(results[2 * count : 3 * count]), sigmas


class Normalised:
    """Normalised weights and all that their gradient needs."""

    def __init__(self, layout: Layout, impl: str, normalised, vectors, sigmas):
        self._layout, self._impl = layout, impl
        self._held = normalised, vectors, sigmas

    @property
    def sigmas(self) -> list[torch.Tensor]:
        """σ of every weight, []."""
        return list(self._held[2].unbind())

    def split(self) -> list[torch.Tensor]:
        """The normalised weights, a new view of each."""
        return self._layout.split_normalised(self._held[0])

    def gradients(self, gradients: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """dW = (dW̄ − ⟨dW̄, W̄⟩·u vᵀ)/σ for every dW̄ that is not None; shapes and dtypes of the weights."""
        gradients = _dense_gradients(self._layout, gradients)
        result = torch.empty_like(self._held[0])
        _GRADIENT[self._impl](self._layout.table, gradients, *self._held, result)
        return _split_gradients(self._layout, gradients, result)


def advance(
    weights: Sequence[torch.Tensor],
    dims: Sequence[int],
    us: Sequence[torch.Tensor],
    vs: Sequence[torch.Tensor],
    *,
    n_power_iterations: int,
    eps: float,
    impl: str,
) -> Normalised:
    """As `fastcifar.reference_spectral.advance`, by kernels; weights of one dtype."""
    with torch.no_grad():
        weights, layout = arrange(weights, dims)
    results = _results(layout, weights[0], us[0].dtype)
    _NORMALIZE[impl](layout.table, weights, us, vs, us, vs, results, n_power_iterations, eps)
    return Normalised(layout, impl, *results)
