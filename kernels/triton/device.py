"""What launchers ask about the device."""

from __future__ import annotations

import functools

import torch


@functools.cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def capability_of(tensor: torch.Tensor) -> int:
    """Compute capability × 10 of the tensor's GPU; 0 on a CPU."""
    return _capability(tensor.device.index) if tensor.is_cuda else 0
