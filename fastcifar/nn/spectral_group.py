"""Spectral normalisation of all layers of a model in one batch."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.optim.optimizer import register_optimizer_step_post_hook

from fastcifar import dispatch, validation
from fastcifar.nn.spectral import SpectralNorm


class _Weights(torch.autograd.Function):
    """All normalised weights of a group as functions of the original ones: one node of the graph.

    What backward needs hangs on the context and not on its saved tensors, so that any number of backward passes may
    walk through the same node, each with its own gradients.
    """

    @staticmethod
    def forward(ctx, parts, names, *originals):
        ctx.parts, ctx.names, ctx.originals = parts, names, originals
        ctx.versions = [_version(weight) for weight in originals]
        ctx.set_materialize_grads(False)
        return tuple(_gather(parts, len(originals)))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients):
        for name, weight, version, gradient in zip(ctx.names, ctx.originals, ctx.versions, gradients, strict=True):
            if gradient is not None and _version(weight) != version:
                raise RuntimeError(
                    f"SpectralNormGroup: the weight of {name} was changed in place (an optimiser step?) between the "
                    "forward pass and this backward pass; run the backward pass first, or the forward pass again"
                )
        if len(ctx.parts) == 1:
            return None, None, *ctx.parts[0][1].gradients(gradients)
        results = [None] * len(gradients)
        for chosen, normalised in ctx.parts:
            part = normalised.gradients([gradients[i] for i in chosen])
            for i, gradient in zip(chosen, part, strict=True):
                results[i] = gradient
        return None, None, *results


def _gather(parts, count: int) -> list[torch.Tensor]:
    """All normalised weights in the order of the layers, as new tensors."""
    if len(parts) == 1:
        return parts[0][1].split()
    weights = [None] * count
    for chosen, normalised in parts:
        for i, weight in zip(chosen, normalised.split(), strict=True):
            weights[i] = weight
    return weights


class _GroupedList(parametrize.ParametrizationList):
    """The parametrisations of a layer in a group: it has one, and asks the group for what that would give."""

    def __call__(self) -> torch.Tensor:
        # Hooks are all that nn.Module's own would add; it costs more than what is called.
        if self._forward_hooks or self._forward_pre_hooks or self._backward_hooks or self._backward_pre_hooks:
            return super().__call__()
        return self.forward()

    def forward(self) -> torch.Tensor:
        # Straight from the dictionaries here and below: attributes of modules cost more than all arithmetic.
        norm = self._modules["0"]
        group = norm._group
        # A replica of nn.DataParallel shares its module's group, and its weights are on another device.
        if group is None or torch.compiler.is_compiling() or group._lists[norm._place] is not self:
            return super().forward()
        return group._read(norm._place, self._original())

    def _original(self) -> torch.Tensor:
        original = self._parameters.get("original")
        return self.original if original is None else original


class SpectralNormGroup:
    """All spectrally normalised layers of a model, normalised in one batch.

    Takes over the layers of `spectral_norm` and of `torch.nn.utils.parametrizations.spectral_norm` (keys and values
    of the state_dict stay). `step()` advances u, v and σ of all of them once; between steps every forward pass sees
    the same network, so that a discriminator judges real and generated images by the same weights. All forward
    passes until the next step share one node of the autograd graph, whose backward is one batched operation; several
    backward passes through it are independent of each other, with or without `retain_graph`.

        group = SpectralNormGroup(discriminator)
        for images in loader:
            group.step()
            loss(discriminator(images), discriminator(generator(noise))).backward()
            optimiser.step()

    When a weight has changed in place (an optimiser step, `load_state_dict`), the next forward pass divides by
    σ = uᵀW v of the new weight; u and v wait for `step()`. A backward pass through a graph from before the change
    raises. Changes that autograd cannot see (through `.data`, or by replaying a CUDA graph) need `step()` or
    `invalidate()`; so does nothing else: switching between train and eval mode invalidates too. In eval mode u and v
    never move. Under torch.compile compile the model and call `step()` outside of it: a compiled forward pass divides
    by σ = uᵀW v itself.

    u and v are deterministic functions of the weights: equal on all ranks of a DistributedDataParallel model. A copy
    of the model has a group of its own; `SpectralNormGroup(copy)` is its handle.

    Args:
        model: any module with spectrally normalised layers, already on its device.
        impl: see `fastcifar.functional.spectral_normalize`.

    Raises:
        ValueError: the model has no such layer, or one whose weight has further parametrisations.

    Source: Miyato et al., Spectral Normalization for Generative Adversarial Networks, 2018.
    """

    def __init__(self, model: nn.Module, *, impl: str = "auto"):
        validation.check_implementation(type(self).__name__, impl)
        self.impl = impl
        self._names: list[str] = []
        self._lists: list[_GroupedList] = []
        self._norms: list[SpectralNorm] | None = []
        for prefix, module in model.named_modules():
            if parametrize.is_parametrized(module):
                for name, parameters in module.parametrizations.items():
                    self._take(f"{prefix}.{name}" if prefix else name, parameters)
        if not self._lists:
            raise ValueError(
                f"{type(self).__name__}: {type(model).__name__} has no spectrally normalised layer; apply "
                "fastcifar.nn.spectral_norm to its layers first"
            )
        self._run: dict[tuple, Any] = {}
        self._seen: dict[int, tuple] = {}
        _see_fused_steps()
        self.invalidate()

    def _take(self, name: str, parameters: parametrize.ParametrizationList) -> None:
        norms = [n for n in parameters if isinstance(n, (SpectralNorm, parametrizations._SpectralNorm))]
        if not norms or not hasattr(norms[0], "_u"):
            return
        if len(parameters) > 1:
            others = ", ".join(type(n).__name__ for n in parameters)
            raise ValueError(
                f"{type(self).__name__}: {name} has several parametrisations ({others}); a group takes layers whose "
                "only one is the spectral norm"
            )
        if isinstance(norms[0], SpectralNorm):
            if norms[0]._group is not None:
                norms[0]._group._drop(norms[0])
        else:
            parameters[0] = SpectralNorm.adopt(norms[0])
        parameters.__class__ = _GroupedList
        norm = parameters[0]
        norm._group, norm._place = self, len(self._lists)
        self._names.append(name)
        self._lists.append(parameters)
        self._norms.append(norm)

    def _drop(self, norm: SpectralNorm) -> None:
        place = norm._place
        del self._names[place], self._lists[place]
        self._norms = [parameters[0] for parameters in self._lists]
        for place, other in enumerate(self._norms):
            other._place = place
        self.invalidate()

    def __len__(self) -> int:
        return len(self._lists)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} layers, impl={self.impl})"

    @property
    def sigmas(self) -> dict[str, torch.Tensor]:
        """σ of each layer's weight ([], on its device) by the parameter's name; of the latest step or refresh."""
        if self._parts is None:
            self._normalise(advance=False)
        values = {}
        for chosen, normalised in self._parts:
            values.update(zip((self._names[i] for i in chosen), normalised.sigmas, strict=True))
        return values

    def step(self) -> None:
        """Advances u, v and σ of every layer in training mode by its number of power iterations.

        Once for every update of the model, before its forward passes. No device is synchronised.
        """
        if torch.compiler.is_compiling():
            return torch.compiler.disable(self._normalise)(advance=True)
        self._normalise(advance=True)

    def invalidate(self) -> None:
        """Has the next forward pass divide by σ = uᵀW v anew; u and v stay."""
        self._parts = self._values = self._outputs = None
        self._marks: list[tuple] = []

    def _normalise(self, *, advance: bool) -> None:
        if self._norms is None:
            self._norms = [parameters[0] for parameters in self._lists]
        originals = [parameters._original() for parameters in self._lists]
        batches: dict[tuple, list[int]] = {}
        for place, (weight, norm) in enumerate(zip(originals, self._norms, strict=True)):
            iterations = norm.n_power_iterations if advance and norm.training else 0
            batches.setdefault((weight.device, weight.dtype, iterations, norm.eps), []).append(place)
        if torch.is_inference_mode_enabled():
            # Tensors made in inference mode could not take part in training later.
            with torch.inference_mode(False), torch.no_grad():
                self._parts = [(chosen, self._run_batch(chosen, originals, *key)) for key, chosen in batches.items()]
        else:
            self._parts = [(chosen, self._run_batch(chosen, originals, *key)) for key, chosen in batches.items()]
        self._marks = [_mark(weight) for weight in originals]
        self._values = self._outputs = None

    def _run_batch(self, chosen: Sequence[int], originals, device, dtype, iterations, eps):
        run = self._run.get((device, dtype))
        if run is None:
            call = dispatch.Call(device=device, dtype=dtype)
            run = self._run[device, dtype] = dispatch.select("spectral_advance", self.impl, call)
        norms = [self._norms[i] for i in chosen]
        vectors = [self._vectors(i, originals[i]) for i in chosen]
        return run(
            [originals[i] for i in chosen],
            [norm.dim for norm in norms],
            [u for u, _ in vectors],
            [v for _, v in vectors],
            n_power_iterations=iterations,
            eps=eps,
        )

    def _vectors(self, place: int, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """u and v as the kernels write them in place; others may have been loaded or given another dtype."""
        buffers, name = self._norms[place]._buffers, self._names[place]
        if self._seen.get(place) != _place_of(buffers, weight):
            for key in ("_u", "_v"):
                if not buffers[key].is_contiguous():
                    buffers[key] = buffers[key].contiguous()
            vectors = {f"u of {name}": buffers["_u"], f"v of {name}": buffers["_v"]}
            validation.check_singular_vectors(type(self).__name__, name, weight, self._norms[place].dim, **vectors)
            self._seen[place] = _place_of(buffers, weight)
        return buffers["_u"], buffers["_v"]

    def _read(self, place: int, weight: torch.Tensor) -> torch.Tensor:
        outputs = self._outputs
        if outputs is not None and self._needed[place] and torch.is_grad_enabled():
            if self._marks[place] == _mark(weight):
                return outputs[place]
        if self._parts is None or self._marks[place] != _mark(weight):
            self._normalise(advance=False)
        if not (weight.requires_grad and torch.is_grad_enabled()):
            if self._values is None:
                self._values = _gather(self._parts, len(self._lists))
            return self._values[place]
        if self._outputs is None or not self._needed[place]:
            originals = [parameters._original() for parameters in self._lists]
            self._needed = [original.requires_grad for original in originals]
            self._outputs = _Weights.apply(self._parts, self._names, *originals)
        return self._outputs[place]

    def __deepcopy__(self, memo: dict) -> SpectralNormGroup:
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        other.impl, other._names, other._run, other._seen = self.impl, list(self._names), {}, {}
        other._lists = copy.deepcopy(self._lists, memo)
        # The lists may be half made: copies of a model and its group refer to each other.
        other._norms = None
        other.invalidate()
        return other


def _version(weight: torch.Tensor) -> int:
    return -1 if weight.is_inference() else weight._version


def _mark(weight: torch.Tensor) -> tuple:
    """Differs after any change of the weight that can be seen without reading it."""
    return _version(weight), weight.data_ptr(), weight.dtype


def _place_of(buffers: dict[str, torch.Tensor], weight: torch.Tensor) -> tuple:
    """Differs where u and v lie elsewhere, or they or the weight are of another kind."""
    u, v = buffers["_u"], buffers["_v"]
    return u.data_ptr(), v.data_ptr(), u.dtype, v.dtype, u.shape, v.shape, weight.dtype, weight.shape, weight.device


def _count_fused_step(optimiser: torch.optim.Optimizer, *_: Any) -> None:
    """torch's fused optimisers change weights without a new version, which groups and autograd would not see."""
    for group in optimiser.param_groups:
        if group.get("fused"):
            torch.autograd.graph.increment_version([p for p in group["params"] if p.grad is not None])


@functools.cache
def _see_fused_steps() -> None:
    register_optimizer_step_post_hook(_count_fused_step)
