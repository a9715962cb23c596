"""Thresholds: a comparison with one number per channel is the sign of the function, for every float32 around it."""

import math

import pytest
import torch
from torch import Tensor, nn

from bonn_qat.packing.thresholds import find_thresholds

CHANNELS = 200


def around(thresholds: Tensor) -> Tensor:
    """The thresholds and the floats beside them, and others, ``(n, C)``."""
    finite = torch.where(thresholds.isfinite(), thresholds, torch.zeros(()))
    up, down = (torch.nextafter(finite, torch.tensor(bound)) for bound in (math.inf, -math.inf))
    return torch.stack([finite, up, down, -finite, torch.zeros_like(finite), *torch.randn(50, len(finite))])


def norm() -> nn.BatchNorm2d:
    made = nn.BatchNorm2d(CHANNELS).eval().requires_grad_(False)
    for tensor in (made.weight, made.bias, made.running_mean):
        tensor.normal_()
    made.running_var.uniform_(0.01, 4)
    made.weight[:5] = 0
    made.bias[0], made.bias[1] = 0, -0.0
    return made


def test_a_norm_and_its_sign_are_a_threshold():
    bn = norm()

    def above(x: Tensor) -> Tensor:
        return bn(x[None, :, None, None])[0, :, 0, 0] >= 0

    thresholds, flips = find_thresholds(above, CHANNELS)
    assert flips.any()
    assert not flips.all()
    assert torch.equal(flips[5:], bn.weight[5:] < 0)
    assert thresholds[:5].isinf().all()  # constant
    for x in around(thresholds):
        assert torch.equal((x >= thresholds) ^ flips, above(x))


@pytest.mark.parametrize("shift", [0.0, -0.0, 1e-42, 3.0e8, -7.25])
def test_a_shift_is_its_own_threshold(shift):
    thresholds, flips = find_thresholds(lambda x: x >= shift, 3)
    assert torch.equal(thresholds, torch.full((3,), shift))
    assert not flips.any()


def test_a_constant_function_has_an_infinite_threshold():
    thresholds, flips = find_thresholds(lambda x: torch.tensor([True, False]), 2)
    assert thresholds.tolist() == [-math.inf, math.inf]
    assert not flips.any()
