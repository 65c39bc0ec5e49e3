"""Spectral normalisation of a layer, as torch does it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from fastcifar import functional, validation
from fastcifar.reference_spectral import power_iterations

if TYPE_CHECKING:
    from fastcifar.nn.spectral_group import SpectralNormGroup

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
                self._buffers[key] = kept[key].to(device=buffer.device, dtype=torch.float32)
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
