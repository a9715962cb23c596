"""CPU: the operators on compiled kernels. What depends on shapes alone is prepared once."""

import functools
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bonn_qat.engine.library import keep_freed_memory
from bonn_qat.runtime import kernels
from bonn_qat.runtime.layout import PADDING, TILE, Geometry, blocks, read_offsets

_PARALLEL = 4_000_000  # products from which a second thread pays
_LANES = 32
_NOTHING = np.empty(0, np.float32)
_NO_CODES = np.empty(0, np.uint8)
keep_freed_memory()


def _threads(products: int) -> int:
    return torch.get_num_threads() if products >= _PARALLEL else 1


def _array(tensor: Tensor) -> Any:
    return (tensor.detach() if tensor.requires_grad else tensor).contiguous().numpy()


def _flat(tensor: Tensor) -> Any:
    return _array(tensor).reshape(-1)


def _pixels(x: Tensor) -> Any:
    """``(B, C, H, W)`` as a flat array in the order of ``torch.channels_last``."""
    return _flat(x.permute(0, 2, 3, 1))


def sign_codes(x: Tensor, thresholds: Tensor, geometry: Geometry) -> Tensor:
    """As :func:`bonn_qat.runtime.operators.sign_codes`."""
    batch, _, height, columns = x.shape
    code_height, code_width = geometry.codes_size(height, columns)
    codes = _new_codes((batch, code_height, code_width, geometry.groups * geometry.width), geometry)
    if not codes.numel():
        return codes
    top, _, left, _ = geometry.padding
    shape = (height, columns, geometry.groups, geometry.width, code_height, code_width, top, left)
    arrays = (_pixels(x), _flat(thresholds), shape, codes.view(-1).numpy())
    if (threads := _threads(8 * x.numel())) > 1:
        kernels.sign_in_threads(*arrays, batch * height, threads)
    else:
        kernels.sign_rows(*arrays, 0, batch * height)
    return codes


def _new_codes(shape: tuple[int, ...], geometry: Geometry) -> Tensor:
    if any(geometry.padding):
        return torch.full(shape, PADDING, dtype=torch.uint8, device="cpu")
    return torch.empty(shape, dtype=torch.uint8, device="cpu")


class Convolution(NamedTuple):
    """A convolution for codes of one shape; it keeps no tensor, so that a change of one is seen in the next call.

    ``following`` is the convolution whose codes it writes.
    """

    following: Geometry | None
    result_shape: tuple[int, int, int, int] | None  # (B, H, W, O); None if only codes are wanted
    codes_shape: tuple[int, ...]
    groups: int
    filled: int  # filters of a group, so many that each block is full
    constants: tuple[Any, ...]  # read offsets, sizes and the program, as the kernel takes them
    places: Any
    items: int
    threads: int

    def __call__(
        self, codes: Tensor, weight: Tensor, vectors: Tensor, thresholds: Tensor | None, residual: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The values ``(B, O, H, W)`` and the codes; None for what was not asked for."""
        y = None if self.result_shape is None else torch.empty(self.result_shape, dtype=torch.float32, device="cpu")
        signs = None if self.following is None else _new_codes(self.codes_shape, self.following)
        if self.items:
            arrays = (
                _flat(codes), _array(weight), *self.constants, _filled(vectors, self.groups, self.filled),
                _NOTHING if residual is None else _pixels(residual), _NOTHING if y is None else y.view(-1).numpy(),
                _NOTHING if thresholds is None else _filled(thresholds, self.groups, self.filled).reshape(-1),
                _NO_CODES if signs is None else signs.view(-1).numpy(), self.places,
            )  # fmt: skip
            if self.threads > 1:
                kernels.convolve_in_threads(*arrays, self.items, self.threads)
            else:
                kernels.convolve_items(*arrays, 0, self.items)
        return None if y is None else y.permute(0, 3, 1, 2), signs


def prepare(
    codes_shape: tuple[int, ...], geometry: Geometry, program: Any, following: Geometry | None, wants_values: bool
) -> Convolution:
    """What does not change between calls of a convolution for codes of one shape; ``program`` is ``(steps, 2)``."""
    batch, height, columns = codes_shape[0], *geometry.output_size(codes_shape[1], codes_shape[2])
    channels, groups, pixels = geometry.out_channels, geometry.groups, height * columns
    sizes = blocks(channels // groups)
    written: tuple[int, ...] = (0,)
    if following is not None:
        written = (batch, *following.codes_size(height, columns), following.groups * following.width)
    threads = _threads(batch * pixels * channels * geometry.taps * geometry.in_channels // groups)
    items = batch * groups * len(sizes)
    # Every item reads the weights again, so there are no more pieces than the threads need.
    pieces = min(math.ceil(4 * threads / items), math.ceil(pixels / TILE)) if threads > 1 and items else 1
    shape = (
        channels // groups, pixels, math.prod(codes_shape[1:]), groups, geometry.width, geometry.weight_bytes // groups,
        len(sizes), pieces, math.prod(written[1:]),
    )  # fmt: skip
    return Convolution(
        following, (batch, height, columns, channels) if wants_values else None, written, groups, sum(sizes),
        (tuple(read_offsets(geometry, codes_shape[1], codes_shape[2])), shape, program),
        _places(height, columns, following), items * pieces, threads,
    )  # fmt: skip


def _filled(vectors: Tensor, groups: int, filled: int) -> Any:
    """``(rows, O)``, padded so that each block of filters is full."""
    array = _array(vectors)
    rows, filters = len(array), array.shape[1] // groups
    if filters == filled:
        return array
    wider = np.zeros((rows, groups, filled), np.float32)
    wider[:, :, :filters] = array.reshape(rows, groups, filters)
    return wider.reshape(rows, -1)


@functools.lru_cache(maxsize=512)
def _places(height: int, columns: int, following: Geometry | None) -> Any:
    """Where each pixel's codes begin within an image, for the convolution that follows."""
    if following is None:
        return np.empty(0, np.int64)
    top, _, left, _ = following.padding
    _, row = following.codes_size(height, columns)
    y, x = np.divmod(np.arange(height * columns, dtype=np.int64), columns)
    return ((y + top) * row + x + left) * (following.groups * following.width)


def elementwise(x: Tensor, program: Any, vectors: Tensor, residual: Tensor | None) -> Tensor:
    """As :func:`bonn_qat.runtime.operators.elementwise`."""
    batch, channels, height, columns = x.shape
    y = torch.empty((batch, height, columns, channels), dtype=torch.float32, device="cpu")
    arrays = (
        _pixels(x), channels, program, _filled(vectors, 1, _LANES * math.ceil(channels / _LANES)),
        _NOTHING if residual is None else _pixels(residual), y.view(-1).numpy(),
    )  # fmt: skip
    pixels = batch * height * columns
    if (threads := _threads(8 * y.numel())) > 1:
        kernels.elementwise_in_threads(*arrays, pixels, threads)
    else:
        kernels.elementwise_pixels(*arrays, 0, pixels)
    return y.permute(0, 3, 1, 2)


def max_pool2d(x: Tensor, sizes: tuple[int, int], kernel: list[int], stride: list[int], padding: list[int]) -> Tensor:
    """As :func:`bonn_qat.runtime.operators.max_pool2d`; ``sizes`` are the rows and columns of the result."""
    batch, channels, height, width = x.shape
    rows, columns = sizes
    y = torch.empty((batch, rows, columns, channels), dtype=torch.float32, device="cpu")
    shape = (channels, height, width, rows, columns, *kernel, *stride, *padding)
    items = batch * rows * math.ceil(channels / _LANES)
    arrays = (_flat(x), shape, y.view(-1).numpy())
    if (threads := _threads(8 * x.numel())) > 1:
        kernels.max_pool_in_threads(*arrays, items, threads)
    else:
        kernels.max_pool_rows(*arrays, 0, items)
    return y.permute(0, 3, 1, 2)
