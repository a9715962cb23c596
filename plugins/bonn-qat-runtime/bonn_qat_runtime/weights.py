"""Weights: the constants of convolutions as the kernels read them."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bonn_qat_runtime.operations import LANES, Convolution, Floats, up

WORDS, NIBBLES = 0, 1


def float_weight(weight: Floats, groups: int) -> Floats:
    """``(O, I / groups, kh, kw)`` -> ``(groups, O / groups / 16, kh, kw, I / groups, 16)``, with zeros at the end."""
    outputs, inputs, kh, kw = weight.shape
    filters = outputs // groups
    blocks = up(filters, LANES) // LANES
    padded = np.zeros((groups, blocks * LANES, inputs, kh, kw), np.float32)
    padded[:, :filters] = weight.reshape(groups, filters, inputs, kh, kw)
    return np.ascontiguousarray(padded.reshape(groups, blocks, LANES, inputs, kh, kw).transpose(0, 1, 4, 5, 3, 2))


def depthwise_weight(weight: Floats) -> Floats:
    """``(C, 1, kh, kw)`` -> ``(kh, kw, pitch)``, with zeros at the end."""
    padded = np.zeros((*weight.shape[2:], up(len(weight), LANES)), np.float32)
    padded[..., : len(weight)] = weight[:, 0].transpose(1, 2, 0)
    return padded


def bit_weight(weight: NDArray[np.bool_], groups: int, layout: int) -> NDArray[np.uint8]:
    """Bools ``(O, I / groups, kh, kw)`` -> bytes in ``layout``, block by block: bits of channels, filters last.

    Padded channels and filters have zeros: channels to 32 for words of four bytes, to 16 for bytes of two nibbles.
    """
    outputs, inputs, kh, kw = weight.shape
    filters, step = outputs // groups, 32 if layout == WORDS else 16
    taps = np.zeros((outputs, kh * kw, up(inputs, step)), np.bool_)
    taps[:, :, :inputs] = weight.reshape(outputs, inputs, kh * kw).transpose(0, 2, 1)
    octets = np.packbits(taps, axis=2, bitorder="little").reshape(groups, filters, -1)
    units = octets.view("<u4") if layout == WORDS else octets
    parts, whole = [], 64 if layout == NIBBLES else 32
    for group in units:
        begin = 0
        while begin < filters:
            size = whole if filters - begin > whole // 2 else whole // 2
            block = group[begin : begin + size]
            filled = np.zeros((units.shape[2], size), units.dtype)
            filled[:, : len(block)] = block.T
            parts.append(filled.reshape(-1).view(np.uint8))
            begin += size
    return np.concatenate(parts)


class Sums(NamedTuple):
    """What a binary convolution starts from, for pixels whose windows reach equally far out of the image.

    ``tables`` ``(H + W,)`` have a number for each row and column of the result, whose sum is a pixel's class;
    ``values`` ``(classes, groups, filters)`` are the pixel's sums if no sign in its window differs. Signs outside are
    zeros, which differ from the weights that are ones: these are given back here.
    """

    tables: NDArray[np.int32]
    values: NDArray[np.int32]


def start_sums(convolution: Convolution, height: int, width: int) -> Sums:
    """The sums for an image of this size, with filters padded to 16."""
    outputs, inputs = convolution.weight.shape[:2]
    groups, filters = convolution.groups, outputs // convolution.groups
    top, _, left, _ = convolution.padding
    row_of, rows = _reaches(convolution, 0, height, top, convolution.result.height)
    column_of, columns = _reaches(convolution, 1, width, left, convolution.result.width)
    ones = convolution.weight.sum(1, dtype=np.int32)  # (O, kh, kw)
    values = np.zeros((len(rows), len(columns), groups, up(filters, LANES)), np.int32)
    for i, (first, last) in enumerate(rows):
        for j, (begin, end) in enumerate(columns):
            outside = ones.sum((1, 2)) - ones[:, first:last, begin:end].sum((1, 2))
            inside = (last - first) * (end - begin) * inputs
            values[i, j, :, :filters] = (inside + 2 * outside).reshape(groups, filters)
    tables = np.concatenate((row_of * len(columns), column_of)).astype(np.int32)
    return Sums(tables, values.reshape(-1, *values.shape[2:]))


def _reaches(
    convolution: Convolution, axis: int, size: int, before: int, count: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each window the number of its kind, and the kinds: the first and the last + 1 of the taps in the image."""
    taps, gap = convolution.weight.shape[2 + axis], convolution.dilation[axis]
    begin = np.arange(count) * convolution.stride[axis] - before
    first = np.clip(-(begin // gap), 0, taps)
    last = np.clip(-((begin - size) // gap), 0, taps)
    kinds, kind_of = np.unique(np.stack((first, np.maximum(first, last)), 1), axis=0, return_inverse=True)
    return kind_of.reshape(-1), kinds
