"""How Triton operators enter PyTorch's dispatcher, and how gradients leave the operators."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import torch

from fastcifar.profiling import annotated


def on_device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Makes the tensor's GPU the current one, where Triton launches; nothing for a CPU tensor."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def implement(library: torch.library.Library, name: str) -> Callable[[Callable], Callable]:
    """Registers the decorated function for CPU tensors (Triton's interpreter) and CUDA tensors.

    Triton launches on the current device, so a call on another GPU's tensors makes that one current meanwhile.
    """

    def register(function: Callable) -> Callable:
        @functools.wraps(function)
        def on_its_device(first, *arguments):
            with on_device_of(first):
                return function(first, *arguments)

        library.impl(name, annotated(name)(function), "CPU")
        library.impl(name, annotated(name)(on_its_device), "CUDA")
        return function

    return register


def strided_like(gradient: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """The gradient with its parameter's strides where these differ in dimensions of size 1 only, as they do for
    [C, 1, K, K] after `.to(memory_format=torch.channels_last)`: DistributedDataParallel warns of such."""
    strides = zip(gradient.shape, gradient.stride(), parameter.stride(), strict=True)
    if all(own == wanted for size, own, wanted in strides if size != 1):
        return gradient.as_strided(gradient.shape, parameter.stride())
    return gradient
