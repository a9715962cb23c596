"""Layout: how the bits of weights and activations lie in memory, and the geometry of a binary convolution.

A *nibble* holds the signs of four channels of one pixel, the first in the lowest bit, 1 for +1. Each group's channels
are padded with zeros to a multiple of eight, in weights and in activations, so that the padding never differs.

Activations are *codes*, one byte for each nibble: twice its value, or ``PADDING`` outside the image,
``(B, H, W, groups * width)`` with ``width`` bytes for a group. Weights have one bit each: bytes of two nibbles, for
each group and for each block of 64 filters (32 at the end, if that is enough) an array ``(taps * width / 2, filters)``.
On disk they are 64-bit words in the order of torch's weight.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PADDING = 32  # twice 16, and no nibble is 16
TILE = 4  # pixels that a kernel computes at once
BLOCK = 64  # filters that a kernel computes at once; the last block may have half as many
_PIECE = 2**22  # weights that are laid out at once
LOOKUPS = 62  # counts of at most 4 that fit into a byte; even, because they come in pairs


@dataclass(frozen=True)
class Geometry:
    """A binary convolution, as fixed when a network is packed. ``padding`` is (top, bottom, left, right)."""

    out_channels: int
    in_channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @classmethod
    def of(cls, numbers: list[int]) -> "Geometry":
        """From the 13 numbers of :attr:`numbers`. Raises ValueError for others."""
        if len(numbers) != 13:
            raise ValueError(f"the geometry of a binary convolution has 13 numbers; got {len(numbers)}")
        o, i, kh, kw, sh, sw, top, bottom, left, right, dh, dw, groups = numbers
        if min(o, i, kh, kw, sh, sw, dh, dw, groups) < 1 or min(numbers) < 0 or o % groups or i % groups:
            raise ValueError(f"{numbers} are not the geometry of a binary convolution")
        return cls(o, i, (kh, kw), (sh, sw), (top, bottom, left, right), (dh, dw), groups)

    @property
    def numbers(self) -> list[int]:
        """The geometry as an operator takes it."""
        return [self.out_channels, self.in_channels, *self.kernel, *self.stride, *self.padding, *self.dilation,
                self.groups]  # fmt: skip

    @property
    def taps(self) -> int:
        """Pixels of a kernel."""
        return self.kernel[0] * self.kernel[1]

    @property
    def width(self) -> int:
        """Bytes of codes for one group of a pixel."""
        return width(self.in_channels, self.groups)

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """Torch's ``(O, I / groups, kh, kw)``."""
        return self.out_channels, self.in_channels // self.groups, *self.kernel

    @property
    def weight_bytes(self) -> int:
        """The length of what :func:`encode_weight` returns."""
        return self.groups * self.taps * self.width // 2 * sum(blocks(self.out_channels // self.groups))

    def codes_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the codes for an image, padding included."""
        top, bottom, left, right = self.padding
        return height + top + bottom, width + left + right

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the result for *codes* of this size, padding included."""
        sizes = zip((height, width), self.kernel, self.stride, self.dilation, strict=True)
        out_height, out_width = ((n - d * (k - 1) - 1) // s + 1 for n, k, s, d in sizes)
        return out_height, out_width


def width(channels: int, groups: int) -> int:
    """Bytes of codes for one group of a pixel."""
    return 2 * math.ceil(channels // groups / 8)


def blocks(filters: int) -> list[int]:
    """The number of filters in each block of a group, padding included."""
    whole, rest = divmod(filters, BLOCK)
    return [BLOCK] * whole + ([BLOCK if rest > BLOCK // 2 else BLOCK // 2] if rest else [])


def pack_words(bits: Tensor) -> Tensor:
    """Bool of any shape -> ``(ceil(n / 64),)`` int64; element i, flattened, is bit i % 64 of word i // 64.

    >>> pack_words(torch.tensor([True, False, True]))
    tensor([5])
    """
    flat = torch.nn.functional.pad(bits.flatten(), (0, -bits.numel() % 64)).view(-1, 8, 8)
    octets = (flat.to(torch.uint8) << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(-1, dtype=torch.uint8)
    return octets.flatten().view(torch.int64)


def unpack_words(words: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of :func:`pack_words`: bool of ``shape``."""
    return _bits(words.contiguous().view(torch.uint8))[: math.prod(shape)].reshape(shape)


def _bits(octets: Tensor) -> Tensor:
    """The bits of bytes, the lowest first, as bools of one axis."""
    places = 1 << torch.arange(8, dtype=torch.uint8, device=octets.device)
    return (octets[:, None].bitwise_and(places) != 0).flatten()


def _nibbles(bits: Tensor, groups: int) -> Tensor:
    """Bool ``(..., groups * channels)`` -> uint8 nibbles ``(..., groups * width)``."""
    channels = bits.shape[-1] // groups
    filled = torch.nn.functional.pad(bits.reshape(*bits.shape[:-1], groups, channels), (0, -channels % 8))
    quads = filled.reshape(*bits.shape[:-1], groups * width(channels, 1), 4).to(torch.uint8)
    return (quads << torch.arange(4, dtype=torch.uint8, device=bits.device)).sum(-1, dtype=torch.uint8)


def encode_weight(bits: Tensor, groups: int = 1) -> Tensor:
    """Bool ``(O, I / groups, kh, kw)``, true for +1 -> uint8 in the layout of the kernels, one axis."""
    nibbles = _nibbles(bits.permute(0, 2, 3, 1), 1).flatten(1)  # (O, taps * width)
    octets = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
    parts = []
    for group in octets.chunk(groups):
        sizes = blocks(len(group))
        filled = torch.nn.functional.pad(group, (0, 0, 0, sum(sizes) - len(group)))
        parts += [block.T.flatten() for block in torch.split(filled, sizes)]
    return torch.cat(parts)


def encode_words(words: Tensor, geometry: Geometry) -> Tensor:
    """:func:`encode_weight` of :func:`unpack_words`, in pieces: the bits as bools would take 64 times the memory."""
    octets, inputs = words.contiguous().view(torch.uint8), math.prod(geometry.weight_shape[1:])
    filters = geometry.out_channels // geometry.groups
    if filters * inputs > _PIECE:  # some blocks of a group at a time, else some groups
        step = BLOCK * max(1, _PIECE // (BLOCK * inputs))
        pieces = [
            (group * filters + begin, group * filters + min(begin + step, filters), 1)
            for group in range(geometry.groups) for begin in range(0, filters, step)
        ]  # fmt: skip
    else:
        step = _PIECE // (filters * inputs)
        pieces = [
            (begin * filters, min(begin + step, geometry.groups) * filters, min(step, geometry.groups - begin))
            for begin in range(0, geometry.groups, step)
        ]
    parts = []
    for first, last, groups in pieces:
        begin, end = first * inputs, last * inputs
        bits = _bits(octets[begin // 8 : -(-end // 8)])[begin % 8 : begin % 8 + end - begin]
        parts.append(encode_weight(bits.view(last - first, *geometry.weight_shape[1:]), groups))
    return torch.cat(parts)


def decode_weight(octets: Tensor, geometry: Geometry) -> Tensor:
    """The inverse of :func:`encode_weight`."""
    filters = geometry.out_channels // geometry.groups
    rows = geometry.taps * geometry.width // 2
    sizes = blocks(filters)
    kernels = []
    for group in torch.split(octets, sum(sizes) * rows):
        parts = [part.view(rows, -1).T for part in torch.split(group, [size * rows for size in sizes])]
        kernels.append(torch.cat(parts)[:filters])
    pairs = torch.cat(kernels)
    nibbles = torch.stack((pairs & 15, pairs >> 4), -1).view(-1, *geometry.kernel, geometry.width)
    return _signs(nibbles, geometry.in_channels // geometry.groups, 1).permute(0, 3, 1, 2)


def _signs(nibbles: Tensor, channels: int, groups: int) -> Tensor:
    """Nibbles ``(..., groups * width)`` -> bool ``(..., channels)``."""
    bits = (nibbles[..., None] >> torch.arange(4, dtype=torch.uint8, device=nibbles.device)) & 1
    own = channels // groups
    return bits.reshape(*nibbles.shape[:-1], groups, 4 * width(own, 1))[..., :own].flatten(-2) != 0


def encode_signs(bits: Tensor, groups: int = 1, padding: tuple[int, int, int, int] = (0, 0, 0, 0)) -> Tensor:
    """Bool ``(B, H, W, C)``, true for +1 -> codes; ``padding`` is (top, bottom, left, right)."""
    top, bottom, left, right = padding
    codes = 2 * _nibbles(bits, groups)
    return torch.nn.functional.pad(codes, (0, 0, left, right, top, bottom), value=PADDING)


def decode_signs(codes: Tensor, channels: int, groups: int = 1) -> Tensor:
    """Codes -> int8 ``(B, H, W, C)`` of {-1, 0, +1}, 0 outside the image."""
    signs = _signs((codes >> 1) & 15, channels, groups).to(torch.int8) * 2 - 1
    return signs * (codes[..., :1] != PADDING)


class ReadOffsets(NamedTuple):
    """Where a kernel finds what it reads, for codes of one size.

    ``bases``, one for each output pixel, padded to whole tiles, is the position of its first tap in the codes of an
    image, ``valid`` the number of its inputs inside the image. A *run* is a contiguous part of a window: ``starts`` are
    relative to the pixel's base, ``lengths`` in codes; after a run with ``ends`` the byte counters are emptied.
    """

    bases: NDArray[np.int64]
    valid: NDArray[np.int32]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    ends: NDArray[np.bool_]


@functools.lru_cache(maxsize=32)
def read_offsets(geometry: Geometry, height: int, width: int) -> ReadOffsets:
    """The offsets for codes ``(height, width)``, padding included."""
    out_height, out_width = geometry.output_size(height, width)
    pixel = geometry.groups * geometry.width
    top, bottom, left, right = geometry.padding
    rows, row_taps = _axis(out_height, height, geometry, 0, top, bottom)
    columns, column_taps = _axis(out_width, width, geometry, 1, left, right)
    bases = ((rows[:, None] * width + columns) * pixel).ravel()
    valid = (row_taps[:, None] * column_taps * (geometry.in_channels // geometry.groups)).ravel()
    fill = (0, -len(bases) % TILE)
    starts, lengths, ends = _runs(geometry, width * pixel, pixel)
    return ReadOffsets(np.pad(bases, fill, "edge"), np.pad(valid, fill, "edge").astype(np.int32), starts, lengths, ends)


def _axis(count: int, size: int, geometry: Geometry, axis: int, before: int, after: int) -> tuple[Any, Any]:
    """Where the windows begin, and how many of their taps lie inside the image."""
    begin = np.arange(count, dtype=np.int64) * geometry.stride[axis]
    # Of the taps 0 to k - 1, those from `first` on are not before the image, and those from `last` on are after it.
    gap, taps = geometry.dilation[axis], geometry.kernel[axis]
    first, last = (np.clip(-((begin - edge) // gap), 0, taps) for edge in (before, size - after))
    return begin, np.maximum(last - first, 0)


def _runs(geometry: Geometry, row: int, pixel: int) -> tuple[Any, Any, Any]:
    (kh, kw), (dh, dw) = geometry.kernel, geometry.dilation
    if geometry.groups == 1 and dw == 1:
        whole = [(y * dh * row, kw * geometry.width) for y in range(kh)]
    else:
        whole = [(y * dh * row + x * dw * pixel, geometry.width) for y in range(kh) for x in range(kw)]
    starts, lengths = [], []
    for start, length in whole:
        parts = math.ceil(length / LOOKUPS)
        step = 2 * math.ceil(length / 2 / parts)
        for begin in range(0, length, step):
            starts.append(start + begin)
            lengths.append(min(step, length - begin))
    ends, held = [], 0
    for length, following in zip(lengths, [*lengths[1:], LOOKUPS], strict=True):
        held += length
        ends.append(held + following > LOOKUPS)
        held *= not ends[-1]
    return np.array(starts, np.int64), np.array(lengths, np.int64), np.array(ends, np.bool_)
