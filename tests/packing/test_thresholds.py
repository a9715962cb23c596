"""Thresholds: an interval for each channel is the sign of the function, for every float32 around it, NaN and inf."""

import math

import pytest
import torch
from torch import Tensor, nn

from bonn_qat.packing.thresholds import find_thresholds

CHANNELS = 200
LARGEST = torch.finfo(torch.float32).max
ODD = (math.nan, math.inf, -math.inf, LARGEST, -LARGEST, 0.0, -0.0, 1e-45, -1e-45)


def around(thresholds: Tensor) -> Tensor:
    """The finite thresholds and the floats beside them, odd numbers, and others, ``(n, C)``."""
    finite = torch.where(thresholds.isfinite(), thresholds, torch.zeros(()))
    up, down = (torch.nextafter(finite, torch.tensor(bound)) for bound in (math.inf, -math.inf))
    odd = torch.tensor(ODD)[:, None].expand(-1, thresholds.shape[1])
    return torch.cat([finite, up, down, -finite, odd, torch.randn(50, thresholds.shape[1])])


def norm() -> nn.BatchNorm2d:
    made = nn.BatchNorm2d(CHANNELS).eval().requires_grad_(False)
    for tensor in (made.weight, made.bias, made.running_mean):
        tensor.normal_()
    made.running_var.uniform_(0.01, 4)
    made.weight[:5] = 0
    made.bias[0], made.bias[1] = 0, -0.0
    made.weight[5:10], made.weight[10:15] = 1e-38, -1e30  # beyond all numbers, and beyond the largest product
    return made


def test_a_norm_and_its_sign_are_an_interval():
    bn = norm()

    def above(x: Tensor) -> Tensor:
        return bn(x[None, :, None, None])[0, :, 0, 0] >= 0

    thresholds = find_thresholds(above, CHANNELS)
    low, high = thresholds
    falling = bn.weight[10:] < 0
    assert falling.any()
    assert not falling.all()
    assert torch.equal(low[10:].isinf(), falling)
    assert torch.equal(high[10:].isinf(), ~falling)
    # 0 times infinity is NaN, whose sign is -1; else the sign is that of the bias.
    assert high[:5].isinf().eq(bn.bias[:5] < 0).all()
    assert ((low[:5] == -LARGEST) | (bn.bias[:5] < 0)).all()
    for x in around(thresholds):
        assert torch.equal((x >= low) & (x <= high), above(x))


@pytest.mark.parametrize("shift", [0.0, -0.0, 2.0**-140, 3.0e8, -7.25, -(2.0**127)])
def test_a_shift_is_its_own_threshold(shift):
    assert find_thresholds(lambda x: x >= shift, 3).tolist() == [[shift] * 3, [math.inf] * 3]
    assert find_thresholds(lambda x: x <= shift, 3).tolist() == [[-math.inf] * 3, [shift] * 3]


def test_a_constant_function_has_infinite_thresholds():
    assert find_thresholds(lambda x: torch.tensor([True, False]), 2)[:, 0].tolist() == [-math.inf, math.inf]
    low, high = find_thresholds(lambda x: torch.zeros(1, dtype=torch.bool), 1)
    assert low > high
