"""Philox4x32-10, a counter-based random generator: the same numbers on every device, in any order, without state.

Source: Salmon, Moraes, Dror, Shaw, Parallel random numbers: as easy as 1, 2, 3, SC 2011.
"""

from __future__ import annotations

import torch

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def _multiply(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of a·b; the 64-bit product may wrap to negative, its bits are right all the same."""
    product = b * a
    return (product >> 32) & _MASK, product & _MASK


def philox(counter: torch.Tensor, step: int | torch.Tensor, purpose: int, seed: int) -> torch.Tensor:
    """Four random 32-bit words for each counter.

    Args:
        counter: [n], int64, each in [0, 2³²): the position that the words belong to.
        step: in [0, 2⁶⁴ − 1], second and third word of the generator's counter; or one int64 number on the device.
        purpose: in [0, 2³²), the fourth.
        seed: in [0, 2⁶⁴), the key.

    Returns:
        [4, n], int64, each in [0, 2³²).
    """
    zero = torch.zeros_like(counter)
    c0, c1, c2, c3 = counter, zero + (step & _MASK), zero + (step >> 32 & _MASK), zero + purpose
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return torch.stack([c0, c1, c2, c3])


def below(words: torch.Tensor, bound: int) -> torch.Tensor:
    """Words as integers in [0, bound); the bias of at most bound / 2³² is not corrected."""
    return (words * bound) >> 32


def uniform(words: torch.Tensor) -> torch.Tensor:
    """Words as float64 in (0, 1), in the middle of 2³² equal intervals."""
    return (words.double() + 0.5) * 2.0**-32
