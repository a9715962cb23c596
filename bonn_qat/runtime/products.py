"""Products: what the operators compute, by the kernels of :mod:`bonn_qat.engine` on a CPU that has them, else in torch.

Both give the same: sums of signs are whole numbers, and what follows them is torch's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from bonn_qat.engine import operators as engine
from bonn_qat.runtime import epilogue
from bonn_qat.runtime.epilogue import SCALE
from bonn_qat.runtime.layout import Geometry, decode_signs, decode_weight, encode_signs

_HALF_EXACT = 2048  # float16 holds every integer up to here


def has_kernels(x: Tensor, groups: int) -> bool:
    """Whether there are kernels for a convolution of this tensor."""
    return engine.AVAILABLE and x.device.type == "cpu" and groups == 1


def sign_words(x: Tensor, thresholds: Tensor, groups: int) -> Tensor:
    """As :func:`bonn_qat.runtime.operators.sign_codes`."""
    low, high = thresholds.contiguous()
    if has_kernels(x, groups) and x.numel():
        x, one, zero = x.contiguous(memory_format=torch.channels_last), torch.ones_like(low), torch.zeros_like(low)
        above, below = (
            engine.signs(x, torch.stack((factor, zero, threshold, zero, zero)))
            for factor, threshold in ((one, low), (-one, -high))
        )
        return above & below  # type: ignore[no-any-return]
    pixels = x.permute(0, 2, 3, 1)
    return encode_signs((pixels >= low) & (pixels <= high), groups)


def binary_conv2d(
    words: Tensor, weight: Tensor, geometry: Geometry, program: list[int], vectors: Tensor, residual: Tensor | None
) -> Tensor:
    """As :func:`bonn_qat.runtime.operators.binary_conv2d`."""
    if has_kernels(words, geometry.groups) and words.numel():
        y = _by_kernels(words, weight, geometry, vectors[program[1]] if program[:1] == [SCALE] else None)
        program = program[2:] if program[:1] == [SCALE] else program
    else:
        y = _in_torch(words, weight, geometry)
    return epilogue.run(y, program, vectors, residual).contiguous(memory_format=torch.channels_last)


def _by_kernels(words: Tensor, weight: Tensor, geometry: Geometry, scale: Tensor | None) -> Tensor:
    top, _, left, _ = geometry.padding
    size = geometry.output_size(words.shape[1], words.shape[2])
    if scale is None:
        scale = torch.ones(geometry.out_channels)
    kernels = weight.contiguous().view(len(weight), *geometry.kernel, geometry.words, -1)
    return engine.convolve(  # type: ignore[no-any-return]
        words.contiguous(), kernels, scale.contiguous(), None, None, geometry.in_channels, geometry.stride,
        (top, left), geometry.dilation, size, torch.float32,
    )  # fmt: skip


def _in_torch(words: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    inputs = geometry.taps * geometry.in_channels // geometry.groups
    # The sums are exact in both types; a GPU multiplies float16 faster, and adds in float32.
    dtype = torch.float16 if words.is_cuda and inputs <= _HALF_EXACT else torch.float32
    bits = decode_signs(words, geometry.in_channels, geometry.groups).permute(0, 3, 1, 2)
    kernels = decode_weight(weight, geometry).to(dtype).mul_(2).sub_(1).contiguous(memory_format=torch.channels_last)
    top, bottom, left, right = geometry.padding
    signs = F.pad(bits.to(dtype).mul_(2).sub_(1), (left, right, top, bottom))
    return F.conv2d(signs, kernels, None, geometry.stride, 0, geometry.dilation, geometry.groups).float()
