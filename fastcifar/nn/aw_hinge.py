"""The hinge loss of a discriminator whose two halves are weighted by their gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist

from fastcifar import dispatch, validation
from fastcifar.nn.aw_hinge_ranks import Exchange

_LEAF = torch._C._functions.AccumulateGrad
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class AdaptiveHinge(NamedTuple):
    """What a step of `AdaptiveWeightedHinge` found: tensors of shape [] on the device, float64 but for `finite` (bool).

    The norms are √(⟨g, g⟩ + 1e-4), as the weights take them; the cosine is ⟨g_r, g_f⟩ over their product.
    """

    loss_real: torch.Tensor
    loss_fake: torch.Tensor
    score_real: torch.Tensor
    score_fake: torch.Tensor
    weight_real: torch.Tensor
    weight_fake: torch.Tensor
    norm_real: torch.Tensor
    norm_fake: torch.Tensor
    cosine: torch.Tensor
    finite: torch.Tensor


class AdaptiveWeightedHinge:
    """Hinge loss of a discriminator D with adaptive weights: grad ← w_r·∇L_r + w_f·∇L_f.

    L_r = mean relu(1 − D(x)), L_f = mean relu(1 + D(G(z))). The weights depend on the two gradients, each taken over
    all parameters as one vector, and on the scores s_r = mean σ(D(x)), s_f = mean σ(D(G(z))): while real images score
    low (s_r < α₁ or s_r < s_f − δ) the step must not raise L_r, while they score high (s_r > α₂) it must not raise
    L_f. Everything is decided on the device, so that a whole step can be captured in a CUDA graph.

    Args:
        parameters: those of the discriminator. Frozen ones are skipped; which ones are may change between steps.
        alpha1, alpha2: α₁ ≤ α₂, thresholds of s_r, in [0, 1].
        delta: δ ≥ 0, how far the score of generated images may exceed that of real ones.
        epsilon: ε ≥ 0, added to both weights.
        normalized: scale by the norms of the gradients.
        process_group: take gradients, losses and scores over the batches of all ranks of this group, which may differ
            in size; None for this process alone. Pass the bare discriminator's logits then, or call its
            DistributedDataParallel wrapper under `no_sync()`: the reduction happens here.
        impl: "auto" takes the best implementation that can run; "native" or "reference" runs that one or raises.

    Raises:
        ValueError: an option out of range, or no parameters.
        TypeError: parameters that are not tensors.

    Source: Zadorozhnyy, Cheng, Ye, Adaptive Weighted Discriminator for Training Generative Adversarial Networks, CVPR
    2021, algorithm 1; the constants and the 1e-4 in the squared norms are those of its code.
    """

    def __init__(
        self,
        parameters: Iterable[torch.Tensor],
        *,
        alpha1: float = 0.5,
        alpha2: float = 0.75,
        delta: float = 0.05,
        epsilon: float = 0.05,
        normalized: bool = True,
        process_group: dist.ProcessGroup | None = None,
        impl: str = "auto",
    ):
        name = type(self).__name__
        if isinstance(parameters, (torch.Tensor, torch.nn.Module)):
            raise TypeError(f"{name}: parameters must be an iterable of tensors; pass discriminator.parameters()")
        # A parameter that two layers share counts once.
        self.parameters = list(dict.fromkeys(parameters))
        if not self.parameters:
            raise ValueError(f"{name}: parameters is empty; pass discriminator.parameters()")
        for parameter in self.parameters:
            if not isinstance(parameter, torch.Tensor):
                raise TypeError(f"{name}: parameters must be tensors, got {type(parameter).__name__}")
            if parameter.dtype not in _DTYPES:
                raise TypeError(f"{name}: parameters must be {_names(_DTYPES)}, got {parameter.dtype}")
        if not 0.0 <= alpha1 <= alpha2 <= 1.0:
            raise ValueError(f"{name}: needs 0 ≤ alpha1 ≤ alpha2 ≤ 1, got alpha1={alpha1!r} and alpha2={alpha2!r}")
        for option, value in (("delta", delta), ("epsilon", epsilon)):
            if not 0.0 <= value < math.inf:
                raise ValueError(f"{name}: {option} must be finite and ≥ 0, got {value!r}")
        validation.check_implementation(name, impl)
        self.options = {
            "alpha1": float(alpha1),
            "alpha2": float(alpha2),
            "delta": float(delta),
            "epsilon": float(epsilon),
            "normalized": bool(normalized),
        }
        self.process_group = process_group
        self.impl = impl
        self._own: dict[int, torch.Tensor] = {}
        self._exchange: Exchange | None = None

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value}" for name, value in self.options.items())
        return f"{type(self).__name__}({len(self.parameters)} parameters, {options}, impl={self.impl})"

    def backward(
        self, real_logits: torch.Tensor, fake_logits: torch.Tensor, *, scale: float | torch.Tensor = 1.0
    ) -> AdaptiveHinge:
        """Leaves w_r·∇L_r + w_f·∇L_f in the `.grad` of every parameter, by two backward passes.

        Like `Tensor.backward` it adds to a `.grad` that is there and frees the graphs. Only the parameters receive
        gradients: neither the generator nor the images do. A parameter that neither loss depends on counts as zero and
        its `.grad` is left alone (with a process group it becomes zero, as in `DistributedDataParallel`). Call D on
        real and on generated images separately: were both in one batch, each backward pass would walk the whole of it.

        Where a `.grad` is None it becomes a tensor that this object keeps and writes again in the next step, as with
        `DistributedDataParallel(gradient_as_bucket_view=True)`: clone what must outlive the step.

        Under torch.compile compile the discriminator, not the function around this call: two calls of it that become
        one compiled graph cannot be walked twice.

        A loss, score or gradient that is not finite makes both weights and hence every `.grad` NaN, and `finite`
        False: nothing is repaired in silence. Skip the optimiser's step where `finite` is False, as `GradScaler.step`
        does by itself.

        Args:
            real_logits, fake_logits: D(x) and D(G(z)), [N] or [N, 1], the N of the two may differ; one floating-point
                dtype, on the device of the parameters.
            scale: the losses are multiplied by it before the backward passes, and so is the `.grad` left behind; the
                weights are those of the unscaled gradients. A number, or a tensor of one element on the device: with a
                `GradScaler` pass `scaler.scale(torch.ones((), device=device))` and go on with `scaler.step`; for
                the mean of k accumulated batches pass 1 / k.

        Returns:
            Losses, scores, weights, norms and the cosine, on the device; nothing is synchronised. With a process
            group they are those of the whole batch.

        Raises:
            ValueError: logits of another shape or device, or that depend on no parameter; a scale out of range.
            TypeError: logits of different or unsupported dtypes.
            RuntimeError: the named `impl` cannot run here.
        """
        active = [parameter for parameter in self.parameters if parameter.requires_grad]
        self._check(active, real_logits, fake_logits)
        scaling = self._scaling(scale, real_logits.device)
        call = dispatch.Call(device=real_logits.device, dtype=real_logits.dtype)
        run = dispatch.select("aw_hinge", self.impl, call)

        with torch.no_grad():
            shared = None if self.process_group is None else self._fitting_exchange(active)
            counts = None if shared is None else shared.provisional_counts(real_logits, fake_logits)
            terms, d_real, d_fake = run.hinge_terms(real_logits, fake_logits, counts=counts, **scaling)
            if shared is not None:
                shared.start_terms(terms)
        meet = _graphs_meet(real_logits, fake_logits)
        real = torch.autograd.grad(real_logits, active, d_real, retain_graph=meet, allow_unused=True)
        if shared is not None:
            shared.start_gradients(0, real)
        fake = torch.autograd.grad(fake_logits, active, d_fake, allow_unused=True)
        with torch.no_grad():
            if shared is not None:
                shared.start_gradients(1, fake)
                terms, real, fake = shared.finish()
            used = [i for i in range(len(active)) if real[i] is not None or fake[i] is not None]
            if not used:
                raise ValueError(
                    f"{type(self).__name__}: the logits depend on none of the {len(active)} parameters that require "
                    "grad; pass the parameters of the discriminator that made them"
                )
            parameters, real, fake = ([items[i] for i in used] for items in (active, real, fake))
            weights, finite = run.gradient_weights(terms, real, fake, **scaling, **self.options)
            self._leave(run, parameters, real, fake, weights)
        return AdaptiveHinge(*terms.unbind(), *weights.unbind(), finite)

    def generator_loss(self, fake_logits: torch.Tensor) -> torch.Tensor:
        """The generator's side: −mean D(G(z)), shape [], for logits [N] or [N, 1]; differentiable as usual."""
        _check_logits(type(self).__name__, "fake_logits", fake_logits)
        return -fake_logits.mean()

    def _leave(self, run, parameters, real, fake, weights) -> None:
        targets, accumulate, fresh = [], [], []
        for parameter in parameters:
            target = parameter.grad
            accumulate.append(target is not None)
            if target is None:
                target = self._kept(parameter)
                fresh.append((parameter, target))
            targets.append(target)
        run.combine_(targets, real, fake, weights, accumulate=accumulate)
        for parameter, target in fresh:
            parameter.grad = target

    def _kept(self, parameter: torch.Tensor) -> torch.Tensor:
        kept = self._own.get(id(parameter))
        same = kept is not None and kept.shape == parameter.shape and kept.dtype == parameter.dtype
        if not same or kept.get_device() != parameter.get_device():
            kept = self._own[id(parameter)] = torch.empty_like(parameter, requires_grad=False)
        return kept

    def _check(self, active, real_logits, fake_logits) -> None:
        name = type(self).__name__
        for argument, logits in (("real_logits", real_logits), ("fake_logits", fake_logits)):
            _check_logits(name, argument, logits)
            if not logits.requires_grad:
                raise ValueError(
                    f"{name}: {argument} does not require grad; compute it outside torch.no_grad() and do not detach it"
                )
        if real_logits.dtype != fake_logits.dtype:
            raise TypeError(
                f"{name}: real_logits and fake_logits must have the same dtype, "
                f"got {real_logits.dtype} and {fake_logits.dtype}"
            )
        if not active:
            raise ValueError(f"{name}: all {len(self.parameters)} parameters are frozen; nothing is left to train")
        devices = {tensor.device for tensor in (*active, fake_logits)} - {real_logits.device}
        if devices:
            raise ValueError(
                f"{name}: parameters and logits must share one device, got {real_logits.device} for real_logits and "
                f"{', '.join(map(str, devices))} for others; move them"
            )

    def _scaling(self, scale: float | torch.Tensor, device: torch.device) -> dict:
        name = type(self).__name__
        if isinstance(scale, torch.Tensor):
            if scale.numel() != 1 or scale.device != device:
                raise ValueError(
                    f"{name}: a scale tensor must have one element on {device}, got shape {tuple(scale.shape)} on "
                    f"{scale.device}"
                )
            return {"scale": 1.0, "device_scale": scale.detach().float().reshape(())}
        if not 0.0 < scale < math.inf:
            raise ValueError(f"{name}: scale must be finite and > 0, got {scale!r}")
        return {"scale": float(scale), "device_scale": None}

    def _fitting_exchange(self, active) -> Exchange:
        if self._exchange is None or not self._exchange.fits(active, self.process_group):
            self._exchange = Exchange(active, self.process_group)
        return self._exchange


def _names(dtypes) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _check_logits(name: str, argument: str, logits: torch.Tensor) -> None:
    if not isinstance(logits, torch.Tensor):
        raise TypeError(f"{name}: {argument} must be a tensor, got {type(logits).__name__}")
    if logits.dtype not in _DTYPES:
        raise TypeError(f"{name}: {argument} must be {_names(_DTYPES)}, got {logits.dtype}")
    if logits.numel() == 0 or logits.dim() not in (1, 2) or logits.dim() == 2 and logits.shape[1] != 1:
        raise ValueError(f"{name}: {argument} must have shape (N,) or (N, 1) with N ≥ 1, got {tuple(logits.shape)}")


def _graphs_meet(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether a backward pass from `a` would free what one from `b` needs (leaves hold nothing to free)."""
    return not _inner_nodes(a.grad_fn).isdisjoint(_inner_nodes(b.grad_fn))


def _inner_nodes(root) -> set:
    found = set() if root is None else {root}
    pending = list(found)
    while pending:
        for node, _ in pending.pop().next_functions:
            if node is not None and type(node) is not _LEAF and node not in found:
                found.add(node)
                pending.append(node)
    return found
