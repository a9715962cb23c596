"""Convolutions: lowerings of bonn-qat's operators, of torch's convolutions and linear layers, and of pools."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bonn_qat_runtime.builder import (
    LARGEST,
    Builder,
    Refused,
    floats,
    images,
    pair,
    tensor,
    whole,
)
from bonn_qat_runtime.errors import shown
from bonn_qat_runtime.files import Tensor
from bonn_qat_runtime.operations import (
    ADD,
    CLAMP,
    RESIDUAL,
    ROWS,
    Convolution,
    Floats,
    Map,
    Pool,
    Signs,
    Step,
    convolved_size,
)
from bonn_qat_runtime.views import View, image, laid

_MOST_INPUTS = 2**16 - 1

# ---- bonn-qat's operators ----


def _steps(program: Any, vectors: Any, channels: int, residual: Any) -> list[Step]:
    """An epilogue of bonn-qat: pairs of a code and a row of ``vectors`` ``(rows, channels)``."""
    rows = floats(vectors)
    if rows.ndim != 2 or rows.shape[1] != channels or not isinstance(program, list) or len(program) % 2:
        raise Refused(f"an epilogue with vectors {rows.shape} for {channels} channels")
    steps = []
    for code, row in zip(program[::2], program[1::2], strict=True):
        count = ROWS.get(code, 0) if type(code) is int else 0
        if type(code) is not int or type(row) is not int or not 0 <= code <= CLAMP or not 0 <= row <= len(rows) - count:
            raise Refused(f"an epilogue with the step {shown(code)} of row {shown(row)}")
        if code == RESIDUAL and residual is None:
            raise Refused("an epilogue that adds nothing")
        steps.append(Step(code, tuple(rows[row + i] for i in range(count))))
    return steps


def _residual(builder: Builder, x: Any, base: View) -> Map | None:
    if x is None:
        return None
    if tensor(x).shape != base.shape:
        raise Refused(f"the sum of tensors {base.shape} and {x.shape}")
    return builder.beside(x, base)


def _unpacked(words: Any, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Int64 words -> bools of ``shape``; element i is bit i % 64 of word i // 64."""
    count = math.prod(shape)
    if not isinstance(words, Tensor) or words.type != "int64" or words.array.shape != (-(-count // 64),):
        raise Refused(f"words that do not hold {count:,} bits")
    octets = np.ascontiguousarray(words.array).view(np.uint8)
    return np.unpackbits(octets, count=count, bitorder="little").view(np.bool_).reshape(shape)


def _unpack_signs(builder: Builder, words: Any, shape: Any) -> Tensor:
    bits = _unpacked(words, tuple(whole(n, 1) for n in shape))
    return Tensor("float32", np.where(bits, np.float32(1), np.float32(-1)))


def _geometry(numbers: Any) -> list[int]:
    if not isinstance(numbers, list) or len(numbers) != 13:
        raise Refused("a geometry without 13 numbers")
    o, i, kh, kw, sh, sw, *_, dh, dw, groups = (whole(number, 0) for number in numbers)
    if min(o, i, kh, kw, sh, sw, dh, dw, groups) < 1 or o % groups or i % groups:
        raise Refused(f"the geometry {numbers}")
    if i // groups * kh * kw > _MOST_INPUTS:
        raise Refused(f"a filter of more than {_MOST_INPUTS:,} inputs")
    return numbers


def _sign_codes(builder: Builder, x: Any, thresholds: Any, geometry: Any) -> Signs:
    if _geometry(geometry)[1] != images(x).shape[1]:
        raise Refused(f"the signs of {x.shape[1]} channels for {geometry[1]}")
    rows = floats(thresholds)
    if rows.shape != (2, x.shape[1]):
        raise Refused(f"thresholds {rows.shape} for {x.shape[1]} channels")
    return Signs(builder.mapped(x), rows)


def _binary_conv2d(
    builder: Builder, codes: Any, words: Any, geometry: Any, program: Any, vectors: Any, residual: Any
) -> View:
    o, i, kh, kw, sh, sw, top, bottom, left, right, dh, dw, groups = _geometry(geometry)
    if not isinstance(codes, Signs) or codes.map.channels != i:
        raise Refused(f"something else than signs of {i} channels")
    shape = (
        o,
        convolved_size(codes.map.height, kh, sh, top + bottom, dh),
        convolved_size(codes.map.width, kw, sw, left + right, dw),
    )
    convolution = Convolution(
        codes, weight=_unpacked(words, (o, i // groups, kh, kw)), stride=(sh, sw), padding=(top, bottom, left, right),
        dilation=(dh, dw), groups=groups,
    )  # fmt: skip
    return _with_epilogue(builder, convolution, shape, _steps(program, vectors, o, residual), residual)


def _with_epilogue(
    builder: Builder, convolution: Convolution, shape: tuple[int, int, int], steps: list[Step], residual: Any
) -> View:
    if min(shape) < 1:
        raise Refused(f"a result of {shape}")
    beside = _residual(builder, residual, image(Map(*shape)))
    if convolution.has_epilogue:
        convolution.steps, convolution.residual = steps, beside
        return image(builder.add(convolution, shape))
    y = image(builder.add(convolution, shape))
    return builder.pointwise(y, steps, beside) if steps else y


def _binary_conv2d_sign(builder: Builder, *args: Any) -> Signs:
    return _sign_codes(builder, _binary_conv2d(builder, *args[:6]), *args[6:])


def _binary_conv2d_and_sign(builder: Builder, *args: Any) -> tuple[View, Signs]:
    y = _binary_conv2d(builder, *args[:6])
    return y, _sign_codes(builder, y, *args[6:])


def _elementwise(builder: Builder, x: Any, program: Any, vectors: Any, residual: Any) -> View:
    x = builder.channelwise(images(x), 1)
    return builder.pointwise(
        x, _steps(program, vectors, x.map.channels, residual), _residual(builder, residual, x)
    )  # fmt: skip


# ---- convolutions ----


def _conv2d(
    builder: Builder,
    x: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: Any = 1,
) -> View:
    w, (count, channels, _, _) = floats(weight), _maps(x).shape
    if count > 1:  # parts of an image, one after another
        each = [x.taken(0, slice(n, n + 1)) for n in range(count)]
        return builder.joined([_conv2d(builder, one, weight, bias, stride, padding, dilation, groups) for one in each])
    if w.ndim != 4 or channels != w.shape[1] * whole(groups, 1) or len(w) % groups:
        raise Refused(f"weights {w.shape} in {groups} groups for {channels} channels")
    (sh, sw), (dh, dw) = pair(stride, 1), pair(dilation, 1)
    kh, kw = w.shape[2:]
    if padding in ("same", "valid"):
        totals = [d * (k - 1) if padding == "same" else 0 for d, k in ((dh, kh), (dw, kw))]
        top, left = totals[0] // 2, totals[1] // 2
        sides = (top, totals[0] - top, left, totals[1] - left)
    else:
        ph, pw = pair(padding, 0)
        sides = (ph, ph, pw, pw)
    source = builder.mapped(x)
    convolution = Convolution(source, weight=w, stride=(sh, sw), padding=sides, dilation=(dh, dw), groups=groups)
    shape = (
        len(w),
        convolved_size(source.height, kh, sh, sides[0] + sides[1], dh),
        convolved_size(source.width, kw, sw, sides[2] + sides[3], dw),
    )
    steps = [] if bias is None else [Step(ADD, (_bias(bias, len(w)),))]
    return _with_epilogue(builder, convolution, shape, steps, None)


def _conv1d(builder: Builder, x: Any, weight: Any, bias: Any = None, *options: Any) -> View:
    """A convolution of images with one row. Options for one axis become those for two, which leave the first alone."""
    if len(tensor(x).axes) != 3:
        raise Refused(f"a tensor {x.shape} instead of rows")
    w = Tensor("float32", floats(weight)[:, :, None, :])
    both = [[rest, *o] if isinstance(o, list) else o for rest, o in zip((1, 0, 1), options, strict=False)]
    y = _conv2d(builder, builder.reshaped(x, (*x.shape[:2], 1, x.shape[2])), w, bias, *both, *options[3:])
    return builder.reshaped(y, (*y.shape[:2], y.shape[3]))


def _convolution(
    builder: Builder, x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: Any,
    output_padding: Any, groups: Any,
) -> View:  # fmt: skip
    if transposed:
        return _conv_transpose2d(builder, x, weight, bias, stride, padding, output_padding, groups, dilation)
    return _conv2d(builder, x, weight, bias, stride, padding, dilation, groups)


def _conv_transpose2d(
    builder: Builder, x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, output_padding: Any = 0,
    groups: Any = 1, dilation: Any = 1,
) -> View:  # fmt: skip
    """A convolution, with the kernels turned round, of the image with zeros between its pixels."""
    w, (sh, sw), (ph, pw), (dh, dw) = floats(weight), pair(stride, 1), pair(padding, 0), pair(dilation, 1)
    (more, further), groups, (_, channels, height, width) = pair(output_padding, 0), whole(groups, 1), images(x).shape
    if w.ndim != 4 or len(w) != channels or channels % groups:
        raise Refused(f"weights {w.shape} in {groups} groups for {channels} channels")
    kh, kw = w.shape[2:]
    sides = (dh * (kh - 1) - ph, dh * (kh - 1) - ph + more, dw * (kw - 1) - pw, dw * (kw - 1) - pw + further)
    if min(sides) < 0:
        raise Refused(f"the padding {shown(padding)} of a kernel {w.shape[2:]}")
    spread = builder.placed(
        [(x, (0, 0, 0, 0), (1, 1, sh, sw))], (1, channels, (height - 1) * sh + 1, (width - 1) * sw + 1), 0.0
    )
    turned = w[:, :, ::-1, ::-1].reshape(groups, channels // groups, -1, kh, kw).swapaxes(1, 2)
    turned = np.ascontiguousarray(turned.reshape(-1, channels // groups, kh, kw))
    source = builder.mapped(spread)
    convolution = Convolution(source, weight=turned, padding=sides, dilation=(dh, dw), groups=groups)
    shape = (
        len(turned),
        convolved_size(source.height, kh, 1, sides[0] + sides[1], dh),
        convolved_size(source.width, kw, 1, sides[2] + sides[3], dw),
    )
    steps = [] if bias is None else [Step(ADD, (_bias(bias, len(turned)),))]
    return _with_epilogue(builder, convolution, shape, steps, None)


def _bias(bias: Any, outputs: int) -> Floats:
    row = floats(bias)
    if row.shape != (outputs,):
        raise Refused(f"a bias {row.shape} for {outputs} outputs")
    return row


def linear(builder: Builder, x: Any, weight: Any, bias: Any = None) -> View:
    """Of the last axis: a convolution with kernels of one pixel, or as large as the map if that is all of it."""
    w = floats(weight)
    if w.ndim != 2 or not tensor(x).axes or w.shape[1] != x.shape[-1]:
        raise Refused(f"weights {w.shape} for an input {x.shape}")
    steps = [] if bias is None else [Step(ADD, (_bias(bias, len(w)),))]
    if x.is_whole and math.prod(x.shape[:-1]) == 1:
        pixel, channel = np.divmod(x.axes[-1], x.map.pitch)
        kernels = np.empty((len(w), x.map.channels, x.map.pixels), np.float32)
        kernels[:, channel, pixel] = w
        convolution = Convolution(x.map, weight=kernels.reshape(len(w), *x.map.shape), steps=steps)
        return laid(builder.add(convolution, (len(w), 1, 1)), (*x.shape[:-1], len(w)))
    x = builder.channelwise(x, -1)
    y = builder.add(Convolution(x.map, weight=w[:, :, None, None], steps=steps), (len(w), *x.map.shape[1:]))
    return View(y, (*(axis // x.map.pitch * y.pitch for axis in x.axes[:-1]), np.arange(len(w))), True)


# ---- pools ----


def _windows(size: int, kernel: int, stride: int, padding: int, dilation: int, is_ceil: bool) -> NDArray[np.int64]:
    """First, last + 1, and elements with the padding, of the windows of a pool."""
    if 2 * padding > kernel:
        raise Refused(f"padding {padding} for a window of {kernel}")
    room = size + 2 * padding - dilation * (kernel - 1) - 1
    count = (-(-room // stride) if is_ceil else room // stride) + 1
    if is_ceil and (count - 1) * stride >= size + padding:
        count -= 1
    if room < 0 or count > LARGEST:
        raise Refused(f"a window of {kernel} in {size} pixels")
    begin = np.arange(count) * stride - padding
    end = np.minimum(begin + dilation * (kernel - 1) + 1, size + padding)
    first = np.where(begin < 0, begin + -(begin // dilation) * dilation, begin)
    return np.stack((first, np.clip(end, 0, size), end - begin), 1)


def _pool(
    builder: Builder, x: Any, kernel: Any, stride: Any, padding: Any, dilation: Any, is_ceil: Any,
    is_mean: bool, counts_padding: bool = True, divisor: int | None = None,
) -> View:  # fmt: skip
    sizes, dilations = pair(kernel, 1), pair(dilation, 1)
    steps = sizes if stride in (None, []) else pair(stride, 1)
    sides = zip(_maps(x).shape[2:], sizes, steps, pair(padding, 0), dilations, strict=True)
    rows, columns = (_windows(*side, bool(is_ceil)) for side in sides)
    for table in (rows, columns):
        if not counts_padding:
            table[:, 2] = table[:, 1] - table[:, 0]
        if divisor is not None:
            table[:, 2] = whole(divisor, 1) if table is rows else 1
    return _pooled_maps(builder, x, rows, columns, dilations, is_mean)


def _maps(x: Any) -> View:
    """Maps ``(N, C, H, W)``: pools take parts of an image as well."""
    if len(tensor(x).axes) != 4:
        raise Refused(f"a tensor {x.shape} instead of maps")
    return tensor(x)


def _pooled_maps(
    builder: Builder, x: View, rows: NDArray[Any], columns: NDArray[Any], dilation: tuple[int, int], is_mean: bool
) -> View:
    """Of each of several maps, which are one above the other."""
    count, channels, height, _ = x.shape
    moved = np.arange(count)[:, None, None] * height * np.array([1, 1, 0]) + rows
    y = pooled(builder, builder.mapped(x), moved.reshape(-1, 3), columns, dilation, is_mean)
    return laid(y, (count, channels, len(rows), len(columns)), 1)


def pooled(
    builder: Builder, x: Map, rows: NDArray[Any], columns: NDArray[Any], dilation: tuple[int, int], is_mean: bool
) -> Map:
    """The maxima or means of windows ``(n, 3)``: first, last + 1 and divisor."""
    rows, columns = rows.astype(np.int32), columns.astype(np.int32)
    pool = Pool(x, rows=rows, columns=columns, dilation=dilation, is_mean=is_mean)
    return builder.add(pool, (x.channels, len(rows), len(columns)))


def _max_pool2d(
    builder: Builder,
    x: Any,
    kernel: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    is_ceil: Any = False,
) -> View:
    return _pool(builder, x, kernel, stride, padding, dilation, is_ceil, is_mean=False)


def _avg_pool2d(
    builder: Builder, x: Any, kernel: Any, stride: Any = None, padding: Any = 0, is_ceil: Any = False,
    counts_padding: Any = True, divisor: Any = None,
) -> View:  # fmt: skip
    return _pool(
        builder, x, kernel, stride, padding, 1, is_ceil, is_mean=True, counts_padding=bool(counts_padding),
        divisor=divisor,
    )  # fmt: skip


def _adaptive_avg_pool2d(builder: Builder, x: Any, size: Any) -> View:
    rows, columns = (_even_windows(*side) for side in zip(_maps(x).shape[2:], pair(size, 1), strict=True))
    return _pooled_maps(builder, x, rows, columns, (1, 1), is_mean=True)


def _avg_pool1d(
    builder: Builder, x: Any, kernel: Any, stride: Any = None, padding: Any = 0, is_ceil: Any = False,
    counts_padding: Any = True,
) -> View:  # fmt: skip
    if len(tensor(x).axes) != 3:
        raise Refused(f"a tensor {x.shape} instead of rows")
    sizes = [(kernel if stride in (None, []) else stride), kernel, padding]
    step, size, side = (n[0] if isinstance(n, list) else n for n in sizes)
    y = builder.reshaped(x, (*x.shape[:2], 1, x.shape[2]))
    y = _avg_pool2d(builder, y, [1, size], [1, step], [0, side], is_ceil, counts_padding)
    return builder.reshaped(y, (*y.shape[:2], y.shape[3]))


def _adaptive_avg_pool1d(builder: Builder, x: Any, size: Any) -> View:
    if len(tensor(x).axes) != 3:
        raise Refused(f"a tensor {x.shape} instead of rows")
    count = whole(size[0] if isinstance(size, list) else size, 1)
    y = _adaptive_avg_pool2d(builder, builder.reshaped(x, (*x.shape[:2], 1, x.shape[2])), [1, count])
    return builder.reshaped(y, (*y.shape[:2], count))


def _adaptive_max_pool2d(builder: Builder, x: Any, size: Any) -> tuple[View]:
    """The second result, where the maxima lie, is not given."""
    rows, columns = (_even_windows(*side) for side in zip(_maps(x).shape[2:], pair(size, 1), strict=True))
    return (_pooled_maps(builder, x, rows, columns, (1, 1), is_mean=False),)


def _max_pool2d_with_indices(builder: Builder, *args: Any) -> tuple[View]:
    return (_max_pool2d(builder, *args),)


def _even_windows(length: int, count: int) -> NDArray[np.int64]:
    i = np.arange(count)
    first, last = i * length // count, -(-(i + 1) * length // count)
    return np.stack((first, last, last - first), 1)


LOWERINGS: Mapping[str, Callable[..., Any]] = {
    "bonn_qat.sign_codes.default": _sign_codes,
    "bonn_qat.binary_conv2d.default": _binary_conv2d,
    "bonn_qat.binary_conv2d_sign.default": _binary_conv2d_sign,
    "bonn_qat.binary_conv2d_and_sign.default": _binary_conv2d_and_sign,
    "bonn_qat.elementwise.default": _elementwise,
    "bonn_qat.max_pool2d.default": _max_pool2d,
    "bonn_qat.unpack_signs.default": _unpack_signs,
    "aten.conv1d.default": _conv1d,
    "aten.conv2d.default": _conv2d,
    "aten.conv2d.padding": _conv2d,
    "aten.conv_transpose2d.input": _conv_transpose2d,
    "aten.convolution.default": _convolution,
    "aten.linear.default": linear,
    "aten.max_pool2d.default": _max_pool2d,
    "aten.max_pool2d_with_indices.default": _max_pool2d_with_indices,
    "aten.avg_pool2d.default": _avg_pool2d,
    "aten.avg_pool1d.default": _avg_pool1d,
    "aten.adaptive_avg_pool1d.default": _adaptive_avg_pool1d,
    "aten.adaptive_avg_pool2d.default": _adaptive_avg_pool2d,
    "aten._adaptive_avg_pool2d.default": _adaptive_avg_pool2d,
    "aten.adaptive_max_pool2d.default": _adaptive_max_pool2d,
}
