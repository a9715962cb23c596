"""Operators: ``torch.ops.bonn_qat``, the parts of packed networks; for eager torch, torch.compile and torch.export.

Images ``(B, C, H, W)`` are in ``torch.channels_last``; :mod:`~bonn_qat.runtime.layout` defines geometry and codes,
which are words of signs, :mod:`~bonn_qat.runtime.epilogue` programs. Sizes that do not fit raise RuntimeError here,
because kernels check little.

- ``sign_codes(x, thresholds, geometry) -> codes``: +1 where ``low <= x <= high``, else -1, also for NaN; for the
  convolution with that geometry. ``thresholds`` ``(2, C)`` are low and high of each channel.
- ``binary_conv2d(codes, weight, geometry, program, vectors, residual) -> y``
- ``binary_conv2d_sign(..., thresholds, following) -> codes``: for the convolution with the geometry ``following``.
- ``binary_conv2d_and_sign(...) -> (y, codes)``
- ``elementwise(x, program, vectors, residual) -> y``: an epilogue without a convolution.
- ``max_pool2d(x, kernel, stride, padding) -> y``: takes ``torch.contiguous_format``, in which a first convolution is
  fastest.
- ``unpack_signs(words, shape) -> float {-1, +1}``
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bonn_qat.runtime import epilogue, products
from bonn_qat.runtime.layout import Geometry, unpack_words

_LARGEST = 2**20  # allowed in a geometry or a window
MOST_INPUTS = 2**16 - 1  # of a filter: the C runtime counts in 16 bits how many differ
_LIBRARY = torch.library.Library("bonn_qat", "DEF")
_CONVOLUTION = "Tensor codes, Tensor weight, int[] geometry, int[] program, Tensor vectors, Tensor? residual"
_SIGN = f"{_CONVOLUTION}, Tensor thresholds, int[] following"
_LIBRARY.define("sign_codes(Tensor x, Tensor thresholds, int[] geometry) -> Tensor")
_LIBRARY.define(f"binary_conv2d({_CONVOLUTION}) -> Tensor")
_LIBRARY.define(f"binary_conv2d_sign({_SIGN}) -> Tensor")
_LIBRARY.define(f"binary_conv2d_and_sign({_SIGN}) -> (Tensor, Tensor)")
_LIBRARY.define("elementwise(Tensor x, int[] program, Tensor vectors, Tensor? residual) -> Tensor")
_LIBRARY.define("max_pool2d(Tensor x, int[] kernel, int[] stride, int[] padding) -> Tensor")
_LIBRARY.define("unpack_signs(Tensor words, int[] shape) -> Tensor")


def geometry_of(numbers: Sequence[int]) -> Geometry:
    """The geometry from its ``numbers``. Raises ValueError for one that the kernels cannot compute."""
    return _geometry(tuple(numbers))


@functools.lru_cache(maxsize=4096)
def _geometry(numbers: tuple[int, ...]) -> Geometry:
    geometry = Geometry.of(list(numbers))
    if max(numbers) > _LARGEST:
        raise ValueError(f"the geometry {list(numbers)} has a number above {_LARGEST:,}")
    if (inputs := math.prod(geometry.weight_shape[1:])) > MOST_INPUTS:
        raise ValueError(f"a filter of {inputs:,} inputs; binary kernels take at most {MOST_INPUTS:,}")
    return geometry


def _expect(what: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tensor.shape != shape or tensor.dtype != dtype:
        raise RuntimeError(f"{what}: expected {dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}")


def _expect_images(x: Tensor) -> None:
    if x.ndim != 4 or x.dtype != torch.float32:
        raise RuntimeError(f"expected float32 (B, C, H, W), got {x.dtype} {tuple(x.shape)}")


def _check_vectors(vectors: Tensor, channels: int) -> None:
    if vectors.ndim != 2:
        raise RuntimeError(f"the vectors: expected (rows, {channels}), got {tuple(vectors.shape)}")
    _expect("the vectors", vectors, (vectors.shape[0], channels), torch.float32)


def _check_sign(x: Tensor, thresholds: Tensor, geometry: Geometry) -> tuple[int, int, int, int]:
    """The shape of the codes."""
    _expect_images(x)
    _expect("the thresholds", thresholds, (2, geometry.in_channels), torch.float32)
    return _codes_shape(tuple(x.shape), geometry)


def _codes_shape(x_shape: tuple[int, ...], geometry: Geometry) -> tuple[int, int, int, int]:
    batch, channels, height, columns = x_shape
    if channels != geometry.in_channels:
        raise RuntimeError(f"expected {geometry.in_channels} channels, got {channels}")
    return batch, height, columns, geometry.groups * geometry.words


def _result_shape(codes: Tensor, geometry: Geometry) -> tuple[int, int, int, int]:
    if codes.dtype != torch.int32 or codes.ndim != 4 or codes.shape[3] != geometry.groups * geometry.words:
        raise RuntimeError(f"these are not codes for {geometry}: {codes.dtype} {tuple(codes.shape)}")
    return codes.shape[0], geometry.out_channels, *geometry.output_size(*codes.shape[1:3])


def _check(
    codes: Tensor, weight: Tensor, geometry: Geometry, program: list[int], vectors: Tensor, residual: Tensor | None
) -> tuple[int, int, int, int]:
    """The shape of the values."""
    shape = _result_shape(codes, geometry)
    if min(shape[2:]) < 1:
        raise RuntimeError(
            f"an image of {tuple(codes.shape[1:3])} with its padding is smaller than the kernel of {geometry}"
        )
    _expect("the weights", weight, geometry.words_shape, torch.int32)
    _check_vectors(vectors, geometry.out_channels)
    if residual is not None:
        _expect("the residual", residual, shape, torch.float32)
    epilogue.check(program, vectors.shape[0], residual is not None)
    return shape


def _check_following(geometry: Geometry, following: Geometry, thresholds: Tensor) -> None:
    _expect("the thresholds", thresholds, (2, geometry.out_channels), torch.float32)
    if following.in_channels != geometry.out_channels or not can_follow(geometry, following):
        raise RuntimeError(f"codes of {geometry} are not those that {following} takes")


def _check_elementwise(x: Tensor, program: list[int], vectors: Tensor, residual: Tensor | None) -> None:
    _expect_images(x)
    _check_vectors(vectors, x.shape[1])
    if residual is not None:
        _expect("the residual", residual, tuple(x.shape), torch.float32)
    epilogue.check(program, vectors.shape[0], residual is not None)


def _check_words(words: Tensor, shape: Sequence[int]) -> None:
    count = math.prod(shape)
    if words.dtype != torch.int64 or min(shape, default=1) < 1 or words.shape != (-(-count // 64),):
        raise RuntimeError(f"{words.dtype} {tuple(words.shape)} do not hold one bit for each element of {list(shape)}")


def can_follow(geometry: Geometry, following: Geometry) -> bool:
    """Whether a convolution can write the codes of the next one in one pass: groups must not share a byte in either."""
    whole = (g.out_channels // g.groups if g is geometry else g.in_channels // g.groups for g in (geometry, following)
             if g.groups > 1)  # fmt: skip
    return all(channels % 8 == 0 for channels in whole)


def sign_codes(x: Tensor, thresholds: Tensor, geometry: list[int]) -> Tensor:
    """Float32 ``(B, C, H, W)``, thresholds ``(2, C)`` -> codes."""
    shape_of = _geometry(tuple(geometry))
    _check_sign(x, thresholds, shape_of)
    return products.sign_words(x, thresholds, shape_of.groups)


def binary_conv2d(
    codes: Tensor, weight: Tensor, geometry: list[int], program: list[int], vectors: Tensor, residual: Tensor | None
) -> Tensor:
    """Codes -> float32 ``(B, O, H, W)``."""
    own = _geometry(tuple(geometry))
    _check(codes, weight, own, program, vectors, residual)
    return products.binary_conv2d(codes, weight, own, program, vectors, residual)


def binary_conv2d_sign(*args: Any) -> Tensor:
    """As :func:`binary_conv2d`, and then :func:`sign_codes` with the last two arguments."""
    return binary_conv2d_and_sign(*args)[1]


def binary_conv2d_and_sign(*args: Any) -> tuple[Tensor, Tensor]:
    """The results of :func:`binary_conv2d` and :func:`binary_conv2d_sign`."""
    *convolution, thresholds, following = args
    after = _geometry(tuple(following))
    _check_following(_geometry(tuple(args[2])), after, thresholds)
    y = binary_conv2d(*convolution)
    return y, products.sign_words(y, thresholds, after.groups)


def elementwise(x: Tensor, program: list[int], vectors: Tensor, residual: Tensor | None) -> Tensor:
    """Apply an epilogue to float32 ``(B, C, H, W)``; the shape stays the same."""
    _check_elementwise(x, program, vectors, residual)
    return epilogue.run(x, program, vectors, residual).contiguous(memory_format=torch.channels_last)


def _pooled_size(x: Tensor, kernel: list[int], stride: list[int], padding: list[int]) -> tuple[Any, Any]:
    _expect_images(x)
    for numbers, least in ((kernel, 1), (stride, 1), (padding, 0)):
        if len(numbers) != 2 or min(numbers) < least or max(numbers) > _LARGEST:
            raise RuntimeError(f"{kernel}, {stride}, {padding} are not valid windows")
    if any(2 * p > k for p, k in zip(padding, kernel, strict=True)):
        raise RuntimeError(f"padding {padding} is more than half of the kernel {kernel}")
    sides = zip(x.shape[2:], kernel, stride, padding, strict=True)
    rows, columns = ((n + 2 * p - k) // s + 1 for n, k, s, p in sides)
    if min(x.shape[1:]) < 1 or min(rows, columns) < 1:
        raise RuntimeError(f"an image of {tuple(x.shape[1:])} is smaller than the window {kernel}")
    return rows, columns


def max_pool2d(x: Tensor, kernel: list[int], stride: list[int], padding: list[int]) -> Tensor:
    """Float32 ``(B, C, H, W)`` -> ``(B, C, H', W')``; the padding is never a maximum."""
    _pooled_size(x, kernel, stride, padding)
    y = torch.nn.functional.max_pool2d(x, kernel, stride, padding)
    return y.contiguous(memory_format=torch.channels_last)


def unpack_signs(words: Tensor, shape: list[int]) -> Tensor:
    """Int64 words -> float32 of ``shape``."""
    _check_words(words, shape)
    return unpack_words(words, tuple(shape)).to(torch.float32) * 2 - 1


def _register() -> None:
    for function in (sign_codes, binary_conv2d, binary_conv2d_sign, binary_conv2d_and_sign, elementwise,
                     max_pool2d, unpack_signs):  # fmt: skip
        _LIBRARY.impl(function.__name__, function, "CompositeExplicitAutograd")
        _LIBRARY.impl(function.__name__, torch.library.fallthrough_kernel, "Autograd")  # no gradients
    fake = functools.partial(torch.library.register_fake, lib=_LIBRARY)

    @fake("bonn_qat::sign_codes")
    def _(x: Tensor, thresholds: Tensor, geometry: list[int]) -> Tensor:
        return x.new_empty(_check_sign(x, thresholds, geometry_of(geometry)), dtype=torch.int32)

    def values(codes: Tensor, weight: Tensor, geometry: list[int], *rest: Any) -> Tensor:
        batch, channels, height, columns = _check(codes, weight, geometry_of(geometry), *rest)
        return codes.new_empty((batch, height, columns, channels), dtype=torch.float32).permute(0, 3, 1, 2)

    def signs(y: Tensor, geometry: list[int], thresholds: Tensor, following: list[int]) -> Tensor:
        own, after = geometry_of(geometry), geometry_of(following)
        _check_following(own, after, thresholds)
        return y.new_empty(_codes_shape(tuple(y.shape), after), dtype=torch.int32)

    @fake("bonn_qat::binary_conv2d")
    def _(*args: Any) -> Tensor:
        return values(*args)

    @fake("bonn_qat::binary_conv2d_sign")
    def _(*args: Any) -> Tensor:
        return signs(values(*args[:6]), args[2], *args[6:])

    @fake("bonn_qat::binary_conv2d_and_sign")
    def _(*args: Any) -> tuple[Tensor, Tensor]:
        y = values(*args[:6])
        return y, signs(y, args[2], *args[6:])

    @fake("bonn_qat::elementwise")
    def _(x: Tensor, program: list[int], vectors: Tensor, residual: Any) -> Tensor:
        _check_elementwise(x, program, vectors, residual)
        batch, channels, height, columns = x.shape
        return x.new_empty((batch, height, columns, channels)).permute(0, 3, 1, 2)

    @fake("bonn_qat::max_pool2d")
    def _(x: Tensor, kernel: list[int], stride: list[int], padding: list[int]) -> Tensor:
        batch, channels, rows, columns = *x.shape[:2], *_pooled_size(x, kernel, stride, padding)
        return x.new_empty((batch, rows, columns, channels)).permute(0, 3, 1, 2)

    @fake("bonn_qat::unpack_signs")
    def _(words: Tensor, shape: list[int]) -> Tensor:
        _check_words(words, shape)
        return words.new_empty(shape, dtype=torch.float32)


_register()
