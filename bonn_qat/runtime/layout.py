"""Layout: how the bits of weights and activations lie in memory, and the geometry of a binary convolution.

Signs lie in words of 32 bits, int32, the first channel in the lowest bit, 1 for +1. Each group's channels are padded
with zeros to whole words, in weights and in activations, so that the padding never differs.

Activations are ``(B, H, W, groups * words)`` with ``words`` for a group. Weights are
``(groups * blocks, kh * kw * words, 16)`` with a block for 16 filters of a group, as the kernels of
:mod:`bonn_qat.engine` read them. On disk they are 64-bit words in the order of torch's weight.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 16  # filters of a group that lie side by side
_BITS = 32
_PIECE = 2**22  # weights that are laid out at once


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
    def words(self) -> int:
        """Words of one group of a pixel."""
        return math.ceil(self.in_channels // self.groups / _BITS)

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """Torch's ``(O, I / groups, kh, kw)``."""
        return self.out_channels, self.in_channels // self.groups, *self.kernel

    @property
    def words_shape(self) -> tuple[int, int, int]:
        """The shape of what :func:`encode_weight` returns."""
        return self.groups * math.ceil(self.out_channels // self.groups / BLOCK), self.taps * self.words, BLOCK

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the result for an image of this size."""
        top, bottom, left, right = self.padding
        padded = height + top + bottom, width + left + right
        sizes = zip(padded, self.kernel, self.stride, self.dilation, strict=True)
        out_height, out_width = ((n - d * (k - 1) - 1) // s + 1 for n, k, s, d in sizes)
        return out_height, out_width


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


def encode_signs(bits: Tensor, groups: int = 1) -> Tensor:
    """Bool ``(..., C)``, true for +1 -> words ``(..., groups * words)``.

    >>> encode_signs(torch.tensor([[True, False, True]]))
    tensor([[5]], dtype=torch.int32)
    """
    *shape, channels = bits.shape
    own = channels // groups
    filled = torch.nn.functional.pad(bits.reshape(*shape, groups, own), (0, -own % _BITS))
    split = filled.reshape(*shape, groups * math.ceil(own / _BITS), _BITS).to(torch.int32)
    return (split << torch.arange(_BITS, dtype=torch.int32, device=bits.device)).sum(-1, dtype=torch.int32)


def decode_signs(words: Tensor, channels: int, groups: int = 1) -> Tensor:
    """The inverse of :func:`encode_signs`."""
    *shape, count = words.shape
    bits = (words[..., None] >> torch.arange(_BITS, dtype=torch.int32, device=words.device)).bitwise_and_(1) != 0
    return bits.reshape(*shape, groups, count // groups * _BITS)[..., : channels // groups].reshape(*shape, channels)


def encode_weight(bits: Tensor, groups: int = 1) -> Tensor:
    """Bool ``(O, I / groups, kh, kw)``, true for +1 -> words in the layout of the kernels."""
    words = encode_signs(bits.permute(0, 2, 3, 1)).view(groups, len(bits) // groups, -1)
    filled = torch.nn.functional.pad(words, (0, 0, 0, -words.shape[1] % BLOCK))
    return filled.view(-1, BLOCK, words.shape[2]).movedim(1, -1).contiguous()


def encode_words(words: Tensor, geometry: Geometry) -> Tensor:
    """:func:`encode_weight` of :func:`unpack_words`, in pieces: the bits as bools would take 32 times the memory."""
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


def decode_weight(words: Tensor, geometry: Geometry) -> Tensor:
    """The inverse of :func:`encode_weight`."""
    filters, inputs, *kernel = geometry.weight_shape
    rows = words.movedim(-1, 1).reshape(geometry.groups, -1, geometry.taps * geometry.words)
    rows = rows[:, : filters // geometry.groups].reshape(filters, *kernel, geometry.words)
    return decode_signs(rows, inputs).permute(0, 3, 1, 2)
