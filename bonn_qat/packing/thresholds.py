"""Thresholds: a norm and the sign after it, or any function that crosses zero once, as one comparison."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from bonn_qat.layers import BinaryLayer


def sign_thresholds(layer: BinaryLayer) -> tuple[Tensor, Tensor, Tensor] | None:
    """The layer's norm and sign as ``magnitude`` where ``(x >= threshold) ^ flip``, else ``-magnitude``.

    Returns thresholds and flips ``(C,)``, and the magnitude ``()``. None where the inputs are not of two opposite
    values, by a threshold for each channel.
    """
    quantizer = layer.input_quant
    if quantizer is None or quantizer.bits != 1:
        return None
    channels: int = getattr(layer, layer.channels[0])

    def values(x: Tensor) -> Tensor:
        value: Tensor = quantizer.quantize(layer.norm(x))[0]
        return value

    def above(x: Tensor) -> Tensor:
        return values(x[None, :, None, None])[0, :, 0, 0] > 0

    try:
        thresholds, flips = find_thresholds(above, channels)
        probes = torch.randn(64, channels, 1, 1, generator=torch.Generator().manual_seed(0))
        around = torch.where(thresholds.isfinite(), thresholds, 0)[:, None, None]
        probes[1::2] = around + 1e-3 * probes[1::2]
        found = values(probes)
    except (RuntimeError, ValueError):  # a norm or a quantizer that does not take single pixels
        return None
    magnitude = found.flatten()[0].abs()
    expected = torch.where((probes >= thresholds[:, None, None]) ^ flips[:, None, None], magnitude, -magnitude)
    return (thresholds, flips, magnitude) if torch.equal(found, expected) else None


def find_thresholds(above: Callable[[Tensor], Tensor], channels: int) -> tuple[Tensor, Tensor]:
    """The smallest float32 ``t`` of each channel with ``above(x) == (x >= t) ^ flip``, if there is one; both ``(C,)``.

    ``above`` maps ``(C,)`` to bool ``(C,)``, channel by channel. t is -inf or inf where it is constant. The search is a
    bisection over all float32 numbers up to 1e30, so that t takes part in the function's own roundings.

    >>> find_thresholds(lambda x: 2 * x - 3 >= 0, 1)
    (tensor([1.5000]), tensor([False]))
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


def flip_inputs(bits: Tensor, flips: Tensor, groups: int) -> Tensor:
    """Negate weights ``(O, C / groups, kh, kw)`` where ``flips`` ``(C,)``: -1 times -w is +1 times w."""
    per_filter = flips.reshape(groups, 1, -1).expand(-1, len(bits) // groups, -1)
    return bits ^ per_filter.flatten(0, 1)[:, :, None, None]


def _ordered(x: Tensor) -> Tensor:
    """float32 -> int64 in the same order."""
    bits = x.view(torch.int32).to(torch.int64)
    return torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


def _float(ordered: Tensor) -> Tensor:
    bits = torch.where(ordered < 0, -ordered - 2**31, ordered)
    return bits.to(torch.int32).view(torch.float32)
