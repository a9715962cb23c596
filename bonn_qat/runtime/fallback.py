"""Fallback: the operators in plain torch, for machines without numba and for GPUs; also an independent reference."""

import torch
import torch.nn.functional as F
from torch import Tensor

from bonn_qat.runtime import epilogue
from bonn_qat.runtime.layout import Geometry, decode_signs, decode_weight, encode_signs

_HALF_EXACT = 2048  # float16 holds every integer up to here


def sign_codes(x: Tensor, thresholds: Tensor, geometry: Geometry) -> Tensor:
    """As :func:`bonn_qat.runtime.operators.sign_codes`."""
    low, high = thresholds
    pixels = x.permute(0, 2, 3, 1)
    return encode_signs((pixels >= low) & (pixels <= high), geometry.groups, geometry.padding)


def binary_conv2d(
    codes: Tensor, weight: Tensor, geometry: Geometry, program: list[int], vectors: Tensor, residual: Tensor | None
) -> Tensor:
    """As :func:`bonn_qat.runtime.operators.binary_conv2d`."""
    inputs = geometry.taps * geometry.in_channels // geometry.groups
    # The sums are exact in both types; a GPU multiplies float16 faster, and adds in float32.
    dtype = torch.float16 if codes.is_cuda and inputs <= _HALF_EXACT else torch.float32
    signs = decode_signs(codes, geometry.in_channels, geometry.groups).permute(0, 3, 1, 2).to(dtype)
    kernels = decode_weight(weight, geometry).to(dtype) * 2 - 1
    kernels = kernels.contiguous(memory_format=torch.channels_last)
    sums = F.conv2d(signs, kernels, None, geometry.stride, 0, geometry.dilation, geometry.groups)
    done = epilogue.run(sums.float(), program, vectors, residual)
    return done.contiguous(memory_format=torch.channels_last)
