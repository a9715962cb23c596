"""Operators: ``torch.ops.bonn_qat``, what packed networks are made of; for eager torch, torch.compile and torch.export.

On a CPU with numba they are the :mod:`~bonn_qat.runtime.kernels`, elsewhere the :mod:`~bonn_qat.runtime.fallback`, with
equal results. Images ``(B, C, H, W)`` come and go in ``torch.channels_last``; codes and geometry are those of
:mod:`~bonn_qat.runtime.layout`, programs those of :mod:`~bonn_qat.runtime.epilogue`. Sizes that do not fit are a
RuntimeError, for nothing is checked in the kernels.

- ``sign_codes(x, thresholds, geometry) -> codes``: where ``x >= thresholds``, channel by channel, for the convolution
  of that geometry.
- ``binary_conv2d(codes, weight, geometry, program, vectors, residual) -> y``
- ``binary_conv2d_sign(..., thresholds, following) -> codes``: those for the convolution of geometry ``following``.
- ``binary_conv2d_and_sign(...) -> (y, codes)``
- ``elementwise(x, program, vectors, residual) -> y``: an epilogue of its own.
- ``unpack_signs(words, shape) -> float {-1, +1}``
"""

import functools
import math
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bonn_qat.runtime import epilogue, fallback
from bonn_qat.runtime.layout import PADDING, TILE, Geometry, blocks, plan, unpack_words

_PARALLEL = 4_000_000  # products from which on a second thread is worth its call
_LIBRARY = torch.library.Library("bonn_qat", "DEF")
_CONVOLUTION = "Tensor codes, Tensor weight, int[] geometry, int[] program, Tensor vectors, Tensor? residual"
_SIGN = f"{_CONVOLUTION}, Tensor thresholds, int[] following"
_LIBRARY.define("sign_codes(Tensor x, Tensor thresholds, int[] geometry) -> Tensor")
_LIBRARY.define(f"binary_conv2d({_CONVOLUTION}) -> Tensor")
_LIBRARY.define(f"binary_conv2d_sign({_SIGN}) -> Tensor")
_LIBRARY.define(f"binary_conv2d_and_sign({_SIGN}) -> (Tensor, Tensor)")
_LIBRARY.define("elementwise(Tensor x, int[] program, Tensor vectors, Tensor? residual) -> Tensor")
_LIBRARY.define("unpack_signs(Tensor words, int[] shape) -> Tensor")


@functools.cache
def kernels() -> ModuleType | None:
    """The compiled kernels; None without numba."""
    try:
        from bonn_qat.runtime import kernels as compiled
    except ImportError:
        return None
    return compiled


@functools.lru_cache(maxsize=4096)
def _geometry(numbers: tuple[int, ...]) -> Geometry:
    return Geometry.of(list(numbers))


@functools.lru_cache(maxsize=4096)
def _program(numbers: tuple[int, ...], rows: int, has_residual: bool) -> Any:
    epilogue.check(list(numbers), rows, has_residual)
    return np.array(numbers, np.int64).reshape(-1, 2)


def _expect(what: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tensor.shape != shape or tensor.dtype != dtype:
        raise RuntimeError(f"{what}: expected {dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}")


def _codes_shape(x_shape: tuple[int, ...], geometry: Geometry) -> tuple[int, int, int, int]:
    batch, channels, height, columns = x_shape
    if channels != geometry.in_channels:
        raise RuntimeError(f"expected {geometry.in_channels} channels, got {channels}")
    return batch, *geometry.codes_size(height, columns), geometry.groups * geometry.width


def _result_shape(codes: Tensor, geometry: Geometry) -> tuple[int, int, int, int]:
    if codes.dtype != torch.uint8 or codes.ndim != 4 or codes.shape[3] != geometry.groups * geometry.width:
        raise RuntimeError(f"these are no codes for {geometry}: {codes.dtype} {tuple(codes.shape)}")
    return codes.shape[0], geometry.out_channels, *geometry.output_size(*codes.shape[1:3])


def _check(
    codes: Tensor, weight: Tensor, geometry: Geometry, vectors: Tensor, residual: Tensor | None
) -> tuple[int, ...]:
    shape = _result_shape(codes, geometry)
    if min(shape[2:]) < 1:
        raise RuntimeError(
            f"an image of {tuple(codes.shape[1:3])}, padding included, is smaller than the kernel of {geometry}"
        )
    _expect("the weights", weight, (geometry.weight_bytes,), torch.uint8)
    _expect("the vectors", vectors, (vectors.shape[0], geometry.out_channels), torch.float32)
    if residual is not None:
        _expect("the residual", residual, shape, torch.float32)
    return shape


def _check_following(geometry: Geometry, following: Geometry, thresholds: Tensor) -> None:
    _expect("the thresholds", thresholds, (geometry.out_channels,), torch.float32)
    if following.in_channels != geometry.out_channels or not can_follow(geometry, following):
        raise RuntimeError(f"codes of {geometry} are not those that {following} takes")


def can_follow(geometry: Geometry, following: Geometry) -> bool:
    """Whether a convolution can write the codes of the next one: groups of either must not share a byte."""
    whole = (g.out_channels // g.groups if g is geometry else g.in_channels // g.groups for g in (geometry, following)
             if g.groups > 1)  # fmt: skip
    return all(channels % 8 == 0 for channels in whole)


def sign_codes(x: Tensor, thresholds: Tensor, geometry: list[int]) -> Tensor:
    """Float32 ``(B, C, H, W)``, thresholds ``(C,)`` -> codes."""
    shape_of = _geometry(tuple(geometry))
    shape = _codes_shape(tuple(x.shape), shape_of)
    _expect("the thresholds", thresholds, (shape_of.in_channels,), torch.float32)
    if x.dtype != torch.float32:
        raise RuntimeError(f"expected float32, got {x.dtype}")
    compiled = kernels() if x.device.type == "cpu" else None
    if compiled is None:
        return fallback.sign_codes(x, thresholds, shape_of)
    codes = (
        x.new_full(shape, PADDING, dtype=torch.uint8)
        if any(shape_of.padding)
        else x.new_empty(shape, dtype=torch.uint8)
    )
    if not codes.numel():
        return codes
    batch, _, height, columns = x.shape
    numbers = (height, columns, shape_of.groups, shape_of.width, *shape[1:3], shape_of.padding[0], shape_of.padding[2])
    arrays = (_array(x.permute(0, 2, 3, 1)), _array(thresholds), numbers, _array(codes))
    threads = _threads(x.numel() * 8)
    if threads > 1:
        compiled.sign_in_threads(*arrays, batch * height, threads)
    else:
        compiled.sign_rows(*arrays, 0, batch * height)
    return codes


def _array(tensor: Tensor) -> Any:
    return tensor.contiguous().detach().numpy().reshape(-1)


def _threads(products: int) -> int:
    threads = torch.get_num_threads()
    return threads if threads > 1 and products >= _PARALLEL else 1


def _convolve(
    codes: Tensor,
    weight: Tensor,
    geometry: list[int],
    program: list[int],
    vectors: Tensor,
    residual: Tensor | None,
    thresholds: Tensor | None = None,
    following: list[int] | None = None,
    *,
    wants_values: bool = True,
) -> tuple[Tensor, Tensor]:
    own, after = _geometry(tuple(geometry)), None if following is None else _geometry(tuple(following))
    shape = _check(codes, weight, own, vectors, residual)
    steps = _program(tuple(program), vectors.shape[0], residual is not None)
    if after is not None:
        assert thresholds is not None
        _check_following(own, after, thresholds)
    compiled = kernels() if codes.device.type == "cpu" else None
    if compiled is None:
        y = fallback.binary_conv2d(codes, weight, own, program, vectors, residual)
        signs = y if after is None or thresholds is None else fallback.sign_codes(y, thresholds, after)
        return y, signs
    batch, channels, height, columns = shape
    nothing = vectors.new_empty(0)
    y = vectors.new_empty((batch, height, columns, channels)) if wants_values else nothing
    signs = nothing.to(torch.uint8)
    if after is not None:
        signs = signs.new_full(_codes_shape(shape, after), PADDING)
    if batch:
        _run(compiled, codes, weight, own, steps, vectors, residual, y, signs, thresholds, after, shape)
    return (y.permute(0, 3, 1, 2) if wants_values else y), signs


def _run(
    compiled: Any,
    codes: Tensor,
    weight: Tensor,
    geometry: Geometry,
    program: Any,
    vectors: Tensor,
    residual: Tensor | None,
    y: Tensor,
    signs: Tensor,
    thresholds: Tensor | None,
    following: Geometry | None,
    shape: tuple[int, ...],
) -> None:
    batch, channels, height, columns = shape
    filters = channels // geometry.groups
    sizes = blocks(filters)
    if sum(sizes) != filters:
        vectors = _fill(vectors, geometry.groups, sum(sizes))
        thresholds = None if thresholds is None else _fill(thresholds[None], geometry.groups, sum(sizes))
    pixels = height * columns
    products = batch * pixels * channels * geometry.taps * geometry.in_channels // geometry.groups
    threads = _threads(products)
    items = batch * geometry.groups * len(sizes)
    # Every item reads its weights anew: no more pieces than the threads need.
    pieces = min(math.ceil(4 * threads / items), math.ceil(pixels / TILE)) if threads > 1 else 1
    numbers = (
        filters, pixels, codes[0].numel(), geometry.groups, geometry.width, weight.numel() // geometry.groups,
        len(sizes), pieces, signs[0].numel() if following is not None else 0,
    )  # fmt: skip
    nothing = vectors.new_empty(0)
    arrays = (
        _array(codes), _array(weight), tuple(plan(geometry, *codes.shape[1:3])), numbers, program,
        vectors.contiguous().detach().numpy(), _array(nothing if residual is None else residual.permute(0, 2, 3, 1)),
        _array(y), _array(nothing if thresholds is None else thresholds), _array(signs),
        _places(height, columns, following),
    )  # fmt: skip
    if threads > 1:
        compiled.convolve_in_threads(*arrays, items * pieces, threads)
    else:
        compiled.convolve_items(*arrays, 0, items * pieces)


def _fill(vectors: Tensor, groups: int, filled: int) -> Tensor:
    """``(rows, O)`` with room for all filters of each block."""
    grouped = vectors.reshape(len(vectors), groups, -1)
    return torch.nn.functional.pad(grouped, (0, filled - grouped.shape[2])).flatten(1)


@functools.lru_cache(maxsize=512)
def _places(height: int, columns: int, following: Geometry | None) -> Any:
    """Where each pixel's codes begin in those of an image, for the convolution that follows."""
    if following is None:
        return np.empty(0, np.int64)
    top, _, left, _ = following.padding
    _, row = following.codes_size(height, columns)
    pixel = following.groups * following.width
    y, x = np.divmod(np.arange(height * columns, dtype=np.int64), columns)
    return ((y + top) * row + x + left) * pixel


def binary_conv2d(
    codes: Tensor, weight: Tensor, geometry: list[int], program: list[int], vectors: Tensor, residual: Tensor | None
) -> Tensor:
    """Codes -> float32 ``(B, O, H, W)``."""
    return _convolve(codes, weight, geometry, program, vectors, residual)[0]


def binary_conv2d_sign(*args: Any) -> Tensor:
    """As :func:`binary_conv2d`, and then :func:`sign_codes` with the last two arguments, in one pass."""
    return _convolve(*args, wants_values=False)[1]


def binary_conv2d_and_sign(*args: Any) -> tuple[Tensor, Tensor]:
    """What :func:`binary_conv2d` and :func:`binary_conv2d_sign` give."""
    return _convolve(*args)


def elementwise(x: Tensor, program: list[int], vectors: Tensor, residual: Tensor | None) -> Tensor:
    """Float32 ``(B, C, H, W)`` -> the same shape."""
    if x.ndim != 4 or x.dtype != torch.float32:
        raise RuntimeError(f"expected float32 (B, C, H, W), got {x.dtype} {tuple(x.shape)}")
    channels = x.shape[1]
    _expect("the vectors", vectors, (vectors.shape[0], channels), torch.float32)
    if residual is not None:
        _expect("the residual", residual, tuple(x.shape), torch.float32)
    steps = _program(tuple(program), vectors.shape[0], residual is not None)
    compiled = kernels() if x.device.type == "cpu" else None
    if compiled is None:
        y = epilogue.run(x, program, vectors, residual)
        return y.contiguous(memory_format=torch.channels_last)
    x = x.permute(0, 2, 3, 1)
    y = x.new_empty(x.shape)
    vectors = _fill(vectors, 1, 32 * math.ceil(channels / 32)) if channels % 32 else vectors.contiguous()
    beside = _array(vectors.new_empty(0) if residual is None else residual.permute(0, 2, 3, 1))
    arrays = (_array(x), channels, steps, vectors.detach().numpy(), beside, _array(y))
    pixels, threads = y.numel() // max(channels, 1), _threads(8 * y.numel())
    if threads > 1:
        compiled.elementwise_in_threads(*arrays, pixels, threads)
    else:
        compiled.elementwise_pixels(*arrays, 0, pixels)
    return y.permute(0, 3, 1, 2)


def unpack_signs(words: Tensor, shape: list[int]) -> Tensor:
    """Int64 words -> float32 of ``shape``."""
    if words.dtype != torch.int64 or min(shape, default=1) < 1 or words.numel() != math.ceil(math.prod(shape) / 64):
        raise RuntimeError(f"{words.dtype} {tuple(words.shape)} do not hold one bit for each element of {shape}")
    return unpack_words(words, tuple(shape)).to(torch.float32) * 2 - 1


def _register() -> None:
    for function in (sign_codes, binary_conv2d, binary_conv2d_sign, binary_conv2d_and_sign, elementwise,
                     unpack_signs):  # fmt: skip
        _LIBRARY.impl(function.__name__, function, "CompositeExplicitAutograd")
    fake = functools.partial(torch.library.register_fake, lib=_LIBRARY)

    @fake("bonn_qat::sign_codes")
    def _(x: Tensor, thresholds: Tensor, geometry: list[int]) -> Tensor:
        return x.new_empty(_codes_shape(tuple(x.shape), Geometry.of(geometry)), dtype=torch.uint8)

    def values(codes: Tensor, vectors: Tensor, geometry: list[int]) -> Tensor:
        batch, channels, height, columns = _result_shape(codes, Geometry.of(geometry))
        return vectors.new_empty((batch, height, columns, channels)).permute(0, 3, 1, 2)

    def signs(codes: Tensor, geometry: list[int], following: list[int]) -> Tensor:
        shape = _result_shape(codes, Geometry.of(geometry))
        return codes.new_empty(_codes_shape(shape, Geometry.of(following)))

    @fake("bonn_qat::binary_conv2d")
    def _(codes: Tensor, weight: Tensor, geometry: list[int], program: Any, vectors: Tensor, residual: Any) -> Tensor:
        return values(codes, vectors, geometry)

    @fake("bonn_qat::binary_conv2d_sign")
    def _(codes: Tensor, weight: Tensor, geometry: list[int], *rest: Any) -> Tensor:
        return signs(codes, geometry, rest[-1])

    @fake("bonn_qat::binary_conv2d_and_sign")
    def _(
        codes: Tensor, weight: Tensor, geometry: list[int], program: Any, vectors: Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor]:
        return values(codes, vectors, geometry), signs(codes, geometry, rest[-1])

    @fake("bonn_qat::elementwise")
    def _(x: Tensor, program: list[int], vectors: Tensor, residual: Any) -> Tensor:
        batch, channels, height, columns = x.shape
        return x.new_empty((batch, height, columns, channels)).permute(0, 3, 1, 2)

    @fake("bonn_qat::unpack_signs")
    def _(words: Tensor, shape: list[int]) -> Tensor:
        return words.new_empty(shape, dtype=torch.float32)


_register()
