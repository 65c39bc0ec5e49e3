"""Batch normalisation folded into the convolutions before it: what a trained model computes, in plain torch modules."""

from __future__ import annotations

import copy
from collections import Counter

import torch
from torch import fx, nn

from fastcifar import reference
from fastcifar.fuse import unfuse
from fastcifar.fusing.reading import has_hooks
from fastcifar.nn import BatchNormAct, ConditionalBatchNormAct, DepthwiseConvBNAct

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_NORM_FORWARDS = (nn.modules.batchnorm._BatchNorm.forward, nn.SyncBatchNorm.forward)


class AffineAct(nn.Module):
    """act(scale·x + shift + residual): what is left of a batch normalisation.

    Args:
        scale, shift: [C], or None for 1 and 0.
        activation, negative_slope: see `fastcifar.nn.BatchNormAct`.
    """

    def __init__(
        self, scale: torch.Tensor | None, shift: torch.Tensor | None, activation: str, negative_slope: float = 0.01
    ):
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)
        self.activation, self.negative_slope = activation, negative_slope

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        if self.scale is not None:
            shape = (-1, *(1 for _ in x.shape[2:]))
            x = x * self.scale.view(shape) + self.shift.view(shape)
        if residual is not None:
            x = x + residual
        return reference.activate(x, self.activation, self.negative_slope)

    def extra_repr(self) -> str:
        """The activation, as `print(model)` shows it."""
        return self.activation


class ConditionalAffineAct(nn.Module):
    """act(scale_y·x + shift_y): a conditional batch normalisation, its statistics in the table [classes, 2·C]."""

    def __init__(self, table: torch.Tensor, activation: str, negative_slope: float):
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(table)
        self.activation, self.negative_slope = activation, negative_slope

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        scale, shift = self.embedding(labels)[:, :, None, None].chunk(2, 1)
        return reference.activate(x * scale + shift, self.activation, self.negative_slope)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        ours = isinstance(m, (BatchNormAct, DepthwiseConvBNAct, *_NORMS))
        return ours or super().is_leaf_module(m, module_qualified_name)


def _affine(
    mean: torch.Tensor | None, variance: torch.Tensor | None, gamma, beta, eps: float, name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift in float64, [C], or of the shape that γ and β broadcast to."""
    if mean is None or variance is None:
        raise ValueError(f"fold_batch_norm: {name} keeps no running statistics, so there is nothing to fold")
    scale = torch.rsqrt(variance.double() + eps)
    if gamma is not None:
        scale = scale * gamma.double()
    shift = -mean.double() * scale
    return scale, shift if beta is None else shift + beta.double()


def _folded(conv: nn.Module, scale: torch.Tensor, shift: torch.Tensor) -> nn.Module:
    """A new convolution that computes scale·conv(x) + shift; a parametrised weight becomes a plain one."""
    kind = next(kind for kind in _CONVOLUTIONS if isinstance(conv, kind))
    weight = conv.weight.double()
    if kind in _TRANSPOSED:
        # [in, out / groups, …]: each group has its own outputs.
        parts = zip(weight.chunk(conv.groups), scale.chunk(conv.groups), strict=True)
        weight = torch.cat([part * s.view(1, -1, *(1 for _ in conv.kernel_size)) for part, s in parts])
    else:
        weight = weight * scale.view(-1, *(1 for _ in range(weight.dim() - 1)))
    bias = shift if conv.bias is None else shift + scale * conv.bias.double()
    options = {"groups": conv.groups, "dilation": conv.dilation, "padding_mode": conv.padding_mode}
    if kind in _TRANSPOSED:
        options["output_padding"] = conv.output_padding
    plain = kind(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, **options,
        device=conv.weight.device, dtype=conv.weight.dtype,
    )  # fmt: skip
    plain.weight.data, plain.bias.data = weight.to(conv.weight.dtype), bias.to(conv.weight.dtype)
    return plain


def _plain_depthwise(module: DepthwiseConvBNAct, name: str) -> nn.Module:
    conv = nn.Conv2d(
        module.channels, module.channels, module.kernel_size, module.stride, module.padding, module.dilation,
        groups=module.channels, bias=False, device=module.weight.device, dtype=module.weight.dtype,
    )  # fmt: skip
    conv.weight = module.weight
    affine = _affine(module.running_mean, module.running_var, module.bn_weight, module.bn_bias, module.eps, name)
    return nn.Sequential(_folded(conv, *affine), AffineAct(None, None, module.activation, module.negative_slope))


def _plain_conditional(module: ConditionalBatchNormAct, name: str) -> nn.Module:
    gamma, beta = module.embedding.weight.chunk(2, 1)
    table = torch.cat(_affine(module.running_mean, module.running_var, gamma, beta, module.eps, name), 1)
    return ConditionalAffineAct(table.to(module.embedding.weight.dtype), module.activation, module.negative_slope)


def _pairs(model: nn.Module) -> dict[str, str]:
    """The path of the convolution that feeds each normalisation, and nothing else, by the normalisation's path."""
    try:
        # On a copy, because a forward may keep what it is traced with.
        nodes = _Tracer().trace(copy.deepcopy(model)).nodes
    except Exception as error:  # whatever a forward may raise when it meets a symbolic tensor
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"fold_batch_norm: {type(model).__name__}.forward cannot be traced: {reason}") from error
    calls = Counter(node.target for node in nodes if node.op == "call_module")
    found = {}
    for node in nodes:
        source = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) > 1:
            continue
        if source in (*node.args[1:], *node.kwargs.values()) or not calls[node.target] == calls[source.target] == 1:
            continue
        conv = model.get_submodule(source.target)
        if isinstance(conv, _CONVOLUTIONS) and not has_hooks(conv):
            found[node.target] = source.target
    return found


@torch.no_grad()
def fold_batch_norm(model: nn.Module) -> nn.Module:
    """A copy of the model for inference in which plain torch modules do the work of all batch normalisations.

    act(BN(conv(x)) + residual) with the running statistics μ, σ² is act(conv′(x) + residual), W′ = W·γ/√(σ² + ε) and
    b′ = β + (b − μ)·γ/√(σ² + ε), computed in float64. `DepthwiseConvBNAct` becomes a convolution and an activation; a
    normalisation that follows a convolution, and alone uses its output, becomes part of it; any other becomes a scale
    and a shift of each channel; γ and β of a conditional one take the statistics into their tables. A layer with hooks
    stays as it is.

    Args:
        model: any module that `torch.fx` can trace, fused or not; it stays as it is.

    Returns:
        The copy, in eval mode, without gradients; its state-dict keys differ.

    Raises:
        ValueError: the model cannot be traced, or a normalisation keeps no running statistics.
    """
    plain = copy.deepcopy(model).eval().requires_grad_(False)
    unfuse(plain)
    pairs = _pairs(plain)
    made: dict[nn.Module, nn.Module] = {}
    for name, module in list(plain.named_modules(remove_duplicate=False)):
        if module not in made:
            made |= _plain(plain, name, module, pairs.get(name))
    for name, module in list(plain.named_modules(remove_duplicate=False)):
        if module in made:
            plain.set_submodule(name, made[module])
    return plain.eval().requires_grad_(False)


def _plain(model: nn.Module, name: str, module: nn.Module, source: str | None) -> dict[nn.Module, nn.Module]:
    """What stands in for a module, and for the convolution that feeds it."""
    if has_hooks(module):
        return {}
    if isinstance(module, DepthwiseConvBNAct):
        return {module: _plain_depthwise(module, name)}
    if isinstance(module, ConditionalBatchNormAct):
        return {module: _plain_conditional(module, name)}
    ours = isinstance(module, BatchNormAct)
    if not ours and not (isinstance(module, _NORMS) and type(module).forward in _NORM_FORWARDS):
        return {}
    scale, shift = _affine(module.running_mean, module.running_var, module.weight, module.bias, module.eps, name)
    activation = (module.activation, module.negative_slope) if ours else ("none",)
    if source is None:
        scale, shift = (value.to(module.running_mean.dtype) for value in (scale, shift))
        return {module: AffineAct(scale, shift, *activation)}
    conv = model.get_submodule(source)
    return {conv: _folded(conv, scale, shift), module: AffineAct(None, None, *activation)}
