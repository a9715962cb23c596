"""Thresholds: a norm and the sign after it, or any monotonic function and sign, as one interval for each channel."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from bonn_qat.layers import BinaryLayer

_LARGEST = torch.finfo(torch.float32).max


def sign_thresholds(layer: BinaryLayer) -> tuple[Tensor, Tensor, Tensor] | None:
    """The layer's norm and sign as ``magnitude`` where ``(low <= x <= high) ^ flip``, else ``-magnitude``.

    Returns low and high ``(2, C)``, flips ``(C,)`` and the magnitude ``()``. A NaN is in no interval, so a channel is
    flipped where its value for NaN is ``magnitude``. None where the inputs are not of two opposite values, by an
    interval for each channel.
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
        flips = above(torch.full((channels,), math.nan))
        thresholds = find_thresholds(lambda x: above(x) ^ flips, channels)
        probes = torch.randn(64, channels, 1, 1, generator=torch.Generator().manual_seed(0))
        near = torch.where(thresholds.abs() < _LARGEST, thresholds, 0)[..., None, None]
        probes[1::4], probes[3::4] = near[0] + 1e-3 * probes[1::4], near[1] + 1e-3 * probes[3::4]
        probes[-8:] = torch.tensor(
            [math.nan, math.inf, -math.inf, _LARGEST, -_LARGEST, 1e-42, -1e-42, 0.0]
        ).reshape(-1, 1, 1, 1)  # fmt: skip
        found = values(probes)
    except (RuntimeError, ValueError):  # a norm or a quantizer that does not take single pixels
        return None
    magnitude = found.flatten()[0].abs()
    low, high = thresholds[..., None, None]
    is_above = ((probes >= low) & (probes <= high)) ^ flips[:, None, None]
    expected = torch.where(is_above, magnitude, -magnitude)
    return (thresholds, flips, magnitude) if torch.equal(found, expected) else None


def find_thresholds(above: Callable[[Tensor], Tensor], channels: int) -> Tensor:
    """The float32 ``(2, C)``, low and high, of each channel with ``above(x) == (low <= x <= high)``.

    ``above`` maps ``(C,)`` to bool ``(C,)``, channel by channel, and rises, falls or is constant over the finite
    numbers; it may be something else at inf and at -inf, where ``0 * x + b`` is NaN. low is above high where it is
    nowhere true. The search is a bisection over all float32 numbers, so that the result takes part in the function's
    own roundings.

    >>> find_thresholds(lambda x: 2 * x - 3 >= 0, 1), find_thresholds(lambda x: 3 - 2 * x >= 0, 1)
    (tensor([[1.5000],
            [   inf]]), tensor([[  -inf],
            [1.5000]]))
    """
    bound = torch.full((channels,), _LARGEST)
    first, last = above(-bound), above(bound)
    falls = first & ~last
    false, true = _ordered(torch.where(falls, bound, -bound)), _ordered(torch.where(falls, -bound, bound))
    while (true - false).abs().max() > 1:
        middle = (true + false) // 2
        is_above = above(_float(middle))
        true, false = torch.where(is_above, middle, true), torch.where(is_above, false, middle)
    edge, infinite = _float(true), torch.full((channels,), math.inf)
    at_least, at_most = above(-infinite), above(infinite)
    low = torch.where(first, torch.where(at_least, -math.inf, -_LARGEST), torch.where(last, edge, math.inf))
    high = torch.where(last, torch.where(at_most, math.inf, _LARGEST), torch.where(first, edge, -math.inf))
    nowhere = ~first & ~last
    low = torch.where(nowhere & at_least, -math.inf, low)
    high = torch.where(nowhere & at_most, math.inf, high)
    return torch.stack((low, high))


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
