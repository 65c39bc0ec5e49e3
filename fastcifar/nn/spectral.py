"""Spectral normalisation of layers: one layer at a time as torch does it, or all layers of a model in one batch."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from fastcifar import dispatch, functional, validation
from fastcifar.reference_spectral import power_iterations

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LOW = (torch.float16, torch.bfloat16)


class SpectralNorm(nn.Module):
    """The parametrisation that `spectral_norm` registers: weight → weight / σ.

    Buffers as torch's: `_u` [H] and `_v` [W'], in float32 under 16-bit weights (float64 under float64). A weight of
    one dimension is divided by its norm and has no buffers.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        n_power_iterations: int = 1,
        dim: int = 0,
        eps: float = 1e-12,
        *,
        impl: str = "auto",
    ):
        super().__init__()
        name = "spectral_norm"
        if not -weight.dim() <= dim < weight.dim():
            raise IndexError(
                f"{name}: dim must lie in [{-weight.dim()}, {weight.dim() - 1}] for a weight of "
                f"{tuple(weight.shape)}, got {dim}"
            )
        if n_power_iterations < 1:
            raise ValueError(f"{name}: n_power_iterations must be ≥ 1, got {n_power_iterations!r}")
        if not eps > 0.0:
            raise ValueError(f"{name}: eps must be > 0, got {eps!r}")
        validation.check_implementation(name, impl)
        self.dim = dim % weight.dim()
        self.eps = eps
        self.n_power_iterations = n_power_iterations
        self.impl = impl
        self._group: SpectralNormGroup | None = None
        self._place = 0
        if weight.dim() > 1:
            self._initialise(weight.detach())

    @torch.no_grad()
    def _initialise(self, weight: torch.Tensor) -> None:
        dtype = torch.promote_types(weight.dtype, torch.float32)
        matrix = weight.movedim(self.dim, 0).flatten(1).to(dtype)
        u, v = (F.normalize(matrix.new_empty(size).normal_(), dim=0, eps=self.eps) for size in matrix.shape)
        # As many iterations as torch starts with.
        us, vs = power_iterations([matrix], [v], 15, self.eps)
        self.register_buffer("_u", us[0])
        self.register_buffer("_v", vs[0])

    @classmethod
    def adopt(cls, other: nn.Module) -> SpectralNorm:
        """The same parametrisation as torch's `_SpectralNorm`, with its very buffers."""
        norm = cls.__new__(cls)
        nn.Module.__init__(norm)
        norm.dim, norm.eps, norm.n_power_iterations, norm.impl = other.dim, other.eps, other.n_power_iterations, "auto"
        norm._group, norm._place = None, 0
        norm.training = other.training
        for key, buffer in other._buffers.items():
            norm.register_buffer(key, buffer.float() if buffer.dtype in _LOW else buffer)
        return norm

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        if weight.dim() == 1:
            return F.normalize(weight, dim=0, eps=self.eps)
        if self._group is not None and not torch.compiler.is_compiling():
            return self._group._read(self._place, weight)
        # A group moves u and v by itself, in steps.
        iterate = self.training and self._group is None
        normalised, us, vs, _ = functional.spectral_normalize(
            [weight.movedim(self.dim, 0)],
            [self._u],
            [self._v],
            n_power_iterations=self.n_power_iterations if iterate else 0,
            eps=self.eps,
            impl=self.impl,
        )
        if iterate:
            with torch.no_grad():
                self._u.copy_(us[0])
                self._v.copy_(vs[0])
        return normalised[0].movedim(0, self.dim)

    def right_inverse(self, value: torch.Tensor) -> torch.Tensor:
        """What to store so that `value` is the weight before normalisation: the value itself."""
        return value

    def train(self, mode: bool = True) -> SpectralNorm:
        """As `nn.Module.train`; the group looks at the weights anew."""
        if self._group is not None and mode != self.training:
            self._group.invalidate()
        return super().train(mode)

    def _apply(self, fn, recurse=True):
        # Buffers of 16 bits would lose what the iterations add.
        kept = {key: buffer for key, buffer in self._buffers.items()}
        super()._apply(fn, recurse)
        for key, buffer in self._buffers.items():
            if buffer is not None and buffer.dtype in _LOW:
                self._buffers[key] = kept[key].to(device=buffer.device)
        return self

    def extra_repr(self) -> str:
        """The options, as `print(model)` shows them."""
        return f"n_power_iterations={self.n_power_iterations}, dim={self.dim}, eps={self.eps}, impl={self.impl}"


def spectral_norm(
    module: nn.Module,
    name: str = "weight",
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    dim: int | None = None,
    *,
    impl: str = "auto",
) -> nn.Module:
    """Divides a parameter of the module by an estimate of its largest singular value, each time it is read.

    Drop-in for `torch.nn.utils.parametrizations.spectral_norm`: the same values, the same keys in `state_dict()`
    (`parametrizations.<name>.original`, `parametrizations.<name>.0._u`, `._v`), checkpoints of either load into the
    other. In training mode each read advances u and v by `n_power_iterations`, in eval mode they stay. See
    `SpectralNormGroup` for all layers of a model at once.

    Args:
        module: the layer; its parameter of any shape and floating dtype. u, v and σ are float32 for 16-bit weights.
        name: of the parameter.
        n_power_iterations: ≥ 1, in each read.
        eps: the least norm that u and v are divided by.
        dim: the dimension of the outputs: the rows of the matrix. None: 1 for transposed convolutions, 0 otherwise.
        impl: see `fastcifar.functional.spectral_normalize`.

    Returns:
        The module itself.

    Raises:
        ValueError: no such parameter, or an option out of range.
        IndexError: `dim` is out of range.

    Source: Miyato et al., Spectral Normalization for Generative Adversarial Networks, 2018.
    """
    weight = getattr(module, name, None)
    if not isinstance(weight, torch.Tensor):
        raise ValueError(f"spectral_norm: {type(module).__name__} has no parameter or buffer named {name!r}")
    if not weight.is_floating_point():
        raise ValueError(f"spectral_norm: {name} must be floating point, got {weight.dtype}")
    if dim is None:
        dim = 1 if isinstance(module, _TRANSPOSED) else 0
    norm = SpectralNorm(weight, n_power_iterations, dim, eps, impl=impl)
    parametrize.register_parametrization(module, name, norm)
    return module


class _Weights(torch.autograd.Function):
    """All normalised weights of a group as functions of the original ones: one node of the graph.

    What backward needs hangs on the context and not on its saved tensors, so that any number of backward passes may
    walk through the same node, each with its own gradients.
    """

    @staticmethod
    def forward(ctx, parts, names, *originals):
        ctx.parts, ctx.names, ctx.originals = parts, names, originals
        ctx.versions = [weight._version for weight in originals]
        ctx.set_materialize_grads(False)
        return tuple(weight.detach() for weight in _gather(parts, len(originals)))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients):
        for name, weight, version in zip(ctx.names, ctx.originals, ctx.versions, strict=True):
            if weight._version != version:
                raise RuntimeError(
                    f"SpectralNormGroup: the weight of {name} was changed in place (an optimiser step?) between the "
                    "forward pass and this backward pass; run the backward pass first, or the forward pass again"
                )
        results = [None] * len(gradients)
        for chosen, normalised in ctx.parts:
            part = normalised.gradients([gradients[i] for i in chosen])
            for i, gradient in zip(chosen, part, strict=True):
                results[i] = gradient
        return None, None, *results


def _gather(parts, count: int) -> list[torch.Tensor]:
    weights = [None] * count
    for chosen, normalised in parts:
        for i, weight in zip(chosen, normalised.weights, strict=True):
            weights[i] = weight
    return weights


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
        self._lists: list[parametrize.ParametrizationList] = []
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
        parameters[0]._group, parameters[0]._place = self, len(self._lists)
        self._names.append(name)
        self._lists.append(parameters)

    def _drop(self, norm: SpectralNorm) -> None:
        del self._names[norm._place], self._lists[norm._place]
        for place, parameters in enumerate(self._lists):
            parameters[0]._place = place
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

    @torch.compiler.disable
    def step(self) -> None:
        """Advances u, v and σ of every layer in training mode by its number of power iterations.

        Once for every update of the model, before its forward passes. No device is synchronised.
        """
        self._normalise(advance=True)

    def invalidate(self) -> None:
        """Has the next forward pass divide by σ = uᵀW v anew; u and v stay."""
        self._parts = self._values = self._outputs = None
        self._marks: list[tuple] = []

    def _normalise(self, *, advance: bool) -> None:
        originals = [parameters.original for parameters in self._lists]
        batches: dict[tuple, list[int]] = {}
        for place, (weight, parameters) in enumerate(zip(originals, self._lists, strict=True)):
            norm = parameters[0]
            iterations = norm.n_power_iterations if advance and norm.training else 0
            batches.setdefault((weight.device, weight.dtype, iterations, norm.eps), []).append(place)
        # Tensors made in inference mode could not take part in training later.
        with torch.inference_mode(False), torch.no_grad():
            self._parts = [
                (chosen, self._run_batch(chosen, originals, *key)) for key, chosen in batches.items()
            ]
        self._values = _gather(self._parts, len(originals))
        self._marks = [_mark(weight) for weight in originals]
        self._outputs = None

    def _run_batch(self, chosen: Sequence[int], originals, device, dtype, iterations, eps):
        run = self._run.get((device, dtype))
        if run is None:
            call = dispatch.Call(device=device, dtype=dtype)
            run = self._run[device, dtype] = dispatch.select("spectral_advance", self.impl, call)
        norms = [self._lists[i][0] for i in chosen]
        return run(
            [originals[i] for i in chosen],
            [norm.dim for norm in norms],
            [norm._u for norm in norms],
            [norm._v for norm in norms],
            n_power_iterations=iterations,
            eps=eps,
        )

    def _read(self, place: int, weight: torch.Tensor) -> torch.Tensor:
        if self._parts is None or self._marks[place] != _mark(weight):
            self._normalise(advance=False)
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return self._values[place]
        if self._outputs is None or not self._needed[place]:
            originals = [parameters.original for parameters in self._lists]
            self._needed = [original.requires_grad for original in originals]
            self._outputs = _Weights.apply(self._parts, self._names, *originals)
        return self._outputs[place]

    def __deepcopy__(self, memo: dict) -> SpectralNormGroup:
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        other.impl, other._names, other._run = self.impl, list(self._names), {}
        other._lists = copy.deepcopy(self._lists, memo)
        other.invalidate()
        return other


def _mark(weight: torch.Tensor) -> tuple:
    """Differs after any change of the weight that can be seen without reading it."""
    return weight._version, weight.data_ptr(), weight.dtype
