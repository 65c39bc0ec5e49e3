"""The adaptive-weighted hinge by the compiled module, on the CPU and on CUDA devices.

The three phases have the signatures and the meaning of those in `fastcifar.reference_aw_hinge`; each is one call of the
compiled module, whatever the number of parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastcifar import native
from fastcifar.profiling import annotated

# The codes of `Scalar` in kernels/native/aw_hinge.h.
_SCALARS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
DTYPES = tuple(_SCALARS)


def _place(tensor: torch.Tensor) -> tuple[int, int]:
    """The device as the module knows it (-1 for the CPU) and the handle of its current stream."""
    if not tensor.is_cuda:
        return -1, 0
    return tensor.get_device(), torch.cuda.current_stream(tensor.device).cuda_stream


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _same_memory_order(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether both are dense and hold their elements in the same order."""
    if a.is_contiguous():
        return b.is_contiguous()
    return a.dim() == 4 and all(t.is_contiguous(memory_format=torch.channels_last) for t in (a, b))


@annotated("aw_hinge_terms")
def hinge_terms(
    real_logits: torch.Tensor,
    fake_logits: torch.Tensor,
    *,
    counts: torch.Tensor | None = None,
    scale: float = 1.0,
    device_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `fastcifar.reference_aw_hinge.hinge_terms`."""
    real, fake = real_logits.detach().contiguous(), fake_logits.detach().contiguous()
    d_real, d_fake = torch.empty_like(real), torch.empty_like(fake)
    terms = torch.empty(4, dtype=torch.float64, device=real.device)
    native.module().aw_hinge_terms(
        real.data_ptr(),
        fake.data_ptr(),
        d_real.data_ptr(),
        d_fake.data_ptr(),
        real.numel(),
        fake.numel(),
        _SCALARS[real.dtype],
        _address(counts),
        _address(device_scale),
        scale,
        terms.data_ptr(),
        *_place(real),
    )
    return terms, d_real, d_fake


@annotated("aw_hinge_weights")
def gradient_weights(
    terms: torch.Tensor,
    real_gradients: Sequence[torch.Tensor | None],
    fake_gradients: Sequence[torch.Tensor | None],
    *,
    scale: float = 1.0,
    device_scale: torch.Tensor | None = None,
    alpha1: float = 0.5,
    alpha2: float = 0.75,
    delta: float = 0.05,
    epsilon: float = 0.05,
    normalized: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `fastcifar.reference_aw_hinge.gradient_weights`."""
    module = native.module()
    # `held`: copies must outlive the call.
    reals, fakes, sizes, scalars, held = [], [], [], [], []
    for real, fake in zip(real_gradients, fake_gradients, strict=True):
        if real is None or fake is None:
            some = fake if real is None else real
            if some is None:
                continue
            # Any order of the elements will do, but there must be no gaps.
            if not _same_memory_order(some, some):
                some = some.contiguous()
            real, fake = (None, some) if real is None else (some, None)
        else:
            some = real
            if not _same_memory_order(real, fake):
                real, fake = real.contiguous(), fake.contiguous()
        held.append((real, fake))
        reals.append(0 if real is None else real.data_ptr())
        fakes.append(0 if fake is None else fake.data_ptr())
        sizes.append(some.numel())
        scalars.append(_SCALARS[some.dtype])
    chunk = module.aw_hinge_chunk
    chunks = sum(-(-size // chunk) for size in sizes)
    workspace = torch.empty(3 * chunks, dtype=torch.float64, device=terms.device)
    weights = torch.empty(5, dtype=torch.float64, device=terms.device)
    finite = torch.empty((), dtype=torch.bool, device=terms.device)
    module.aw_hinge_weights(
        reals,
        fakes,
        sizes,
        scalars,
        terms.data_ptr(),
        _address(device_scale),
        scale,
        alpha1,
        alpha2,
        delta,
        epsilon,
        normalized,
        workspace.data_ptr(),
        workspace.numel(),
        weights.data_ptr(),
        finite.data_ptr(),
        *_place(terms),
        torch.get_num_threads(),
    )
    return weights, finite


@annotated("aw_hinge_combine")
def combine_(
    targets: Sequence[torch.Tensor],
    real_gradients: Sequence[torch.Tensor | None],
    fake_gradients: Sequence[torch.Tensor | None],
    weights: torch.Tensor,
    *,
    accumulate: Sequence[bool],
) -> None:
    """As `fastcifar.reference_aw_hinge.combine_`; a gradient has the dtype of its target, or is float32."""
    reals, fakes, outs, sizes, sources, scalars, held = [], [], [], [], [], [], []
    for target, real, fake in zip(targets, real_gradients, fake_gradients, strict=True):
        out, some = target, fake if real is None else real
        if not (_same_memory_order(target, some) and (fake is None or _same_memory_order(target, fake))):
            real = None if real is None else real.contiguous()
            fake = None if fake is None else fake.contiguous()
            out = target.contiguous()
        held.append((out, real, fake))
        reals.append(0 if real is None else real.data_ptr())
        fakes.append(0 if fake is None else fake.data_ptr())
        outs.append(out.data_ptr())
        sizes.append(out.numel())
        sources.append(_SCALARS[some.dtype])
        scalars.append(_SCALARS[out.dtype])
    native.module().aw_hinge_combine(
        reals,
        fakes,
        outs,
        sizes,
        sources,
        scalars,
        list(accumulate),
        weights.data_ptr(),
        *_place(weights),
        torch.get_num_threads(),
    )
    for target, (out, _, _) in zip(targets, held, strict=True):
        if out is not target:
            target.copy_(out)
