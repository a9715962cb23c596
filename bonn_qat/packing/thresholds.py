"""Thresholds: a norm and the sign after it, or any function that rises or falls across zero once, as one comparison."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def find_thresholds(above: Callable[[Tensor], Tensor], channels: int) -> tuple[Tensor, Tensor]:
    """The smallest float32 ``t`` of each channel with ``above(x) == (x >= t) ^ flip``, if there is one; both ``(C,)``.

    ``above`` maps ``(C,)`` to bool ``(C,)``, channel by channel. t is -inf or inf where it is constant. Bisection over
    all float32 numbers up to 1e30, so that t is what the function does in its own roundings.
    """
    bound = torch.full((channels,), 1e30)
    low, high = _ordered(-bound), _ordered(bound)
    first, last = above(-bound), above(bound)
    flips = first & ~last
    while (high - low).max() > 1:
        middle = (low + high) // 2
        is_above = above(_float(middle)) ^ flips
        high, low = torch.where(is_above, middle, high), torch.where(is_above, low, middle)
    thresholds = torch.where(first == last, torch.where(first, -math.inf, math.inf), _float(high))
    return thresholds, flips


def _ordered(x: Tensor) -> Tensor:
    """float32 -> int64 in the same order."""
    bits = x.view(torch.int32).to(torch.int64)
    return torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


def _float(ordered: Tensor) -> Tensor:
    bits = torch.where(ordered < 0, -ordered - 2**31, ordered)
    return bits.to(torch.int32).view(torch.float32)
