"""Lower: the nodes of a file become operations, in their order.

``LOWERINGS`` has a function for each operator of torch or bonn-qat. It is given the arguments, maps and constants among
them, and returns the result.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bonn_qat_runtime.errors import InvalidFile, UnsupportedOperator, shown
from bonn_qat_runtime.files import PackedFile, Tensor
from bonn_qat_runtime.operations import (
    ADD,
    CLAMP,
    FMA,
    PRELU,
    RESIDUAL,
    ROWS,
    SCALE,
    Convolution,
    Floats,
    Map,
    Operation,
    Pointwise,
    Pool,
    Signs,
    Step,
    convolved_size,
)

_LARGEST = 2**20
_MOST_INPUTS = 2**16 - 1
_MOST_ELEMENTS = 2**31  # of a map, or of weights


class Lowered(NamedTuple):
    """The operations of a network and the map that it returns."""

    operations: list[Operation]
    result: Map


class _Refused(Exception):
    """Arguments that an operator of this runtime does not take."""


class _Batch:
    """The number of images, in the shape of a reshape."""


class _Network:
    def __init__(self, file: PackedFile) -> None:
        self.file = file
        self.values: dict[str, Any] = {}
        self.operations: list[Operation] = []

    def add(self, operation: Operation, shape: tuple[int, int, int], is_flat: bool = False) -> Map:
        """The result of a new operation."""
        if min(shape) < 1 or math.prod(shape) > _MOST_ELEMENTS:
            raise _Refused(f"a result of {shape}")
        operation.result = Map(*shape, operation, is_flat)
        self.operations.append(operation)
        return operation.result

    def pointwise(self, x: Map, steps: list[Step], residual: Map | None = None) -> Map:
        return self.add(Pointwise(x, steps=steps, residual=residual), x.shape, x.is_flat)

    def decoded(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self.decoded(item) for item in value]
        if not isinstance(value, dict):
            return value
        if len(value) == 1:
            ((kind, content),) = value.items()
            if kind == "node" and isinstance(content, str) and content in self.values:
                return self.values[content]
            if kind == "number" and content in ("inf", "-inf", "nan"):
                return float(content)
            if kind in ("dtype", "memory_format", "layout", "device"):
                return content
        raise InvalidFile(f"a packed network cannot have the argument {shown(value)}")


def lower(file: PackedFile) -> Lowered:
    """The operations of a network. Raises UnsupportedOperator for one that is not known, InvalidFile for nonsense."""
    network = _Network(file)
    for node in file.nodes:
        op, name = node.get("op"), node.get("name")
        if not isinstance(op, str) or not isinstance(name, str) or name in network.values:
            raise InvalidFile(f"the node {shown(name)} has no op or no name of its own")
        if op == "input":
            network.values[name] = Map(*file.input_size)
        elif op == "tensor":
            network.values[name] = _constant(file, node)
        elif op == "output":
            result, *others = network.decoded(_listed(node, "args"))
            if others or node is not file.nodes[-1] or not isinstance(result, Map):
                raise UnsupportedOperator(f"the network returns more than one map; {_INSTEAD}")
            return Lowered(network.operations, result)
        else:
            network.values[name] = _call(network, op, node)
    raise InvalidFile("the network has no output")


_INSTEAD = "use bonn_qat.PackedModel, which runs every packed network"


def _listed(node: Mapping[str, Any], key: str) -> list[Any]:
    value = node.get(key)
    if not isinstance(value, list) or not value:
        raise InvalidFile(f"the node {shown(node.get('name'))} has no list of {key}")
    return value


def _constant(file: PackedFile, node: Mapping[str, Any]) -> Tensor:
    name = node.get("tensor")
    if not isinstance(name, str) or name not in file.tensors:
        raise InvalidFile(f"the tensor {shown(name)} is missing")
    return file.tensors[name]


def _call(network: _Network, op: str, node: Mapping[str, Any]) -> Any:
    function, kwargs = LOWERINGS.get(op), node.get("kwargs")
    args = network.decoded(_listed(node, "args"))
    try:
        if function is None:
            raise _Refused("an operator that it lacks")
        if not isinstance(kwargs, dict) or (kwargs and op not in _IDENTITIES):
            raise _Refused(f"options {shown(kwargs)}")
        return function(network, *args)
    except (_Refused, TypeError, AttributeError, IndexError) as error:
        reason = str(error) if isinstance(error, _Refused) else "arguments that it does not take"
        raise UnsupportedOperator(
            f"bonn-qat-runtime cannot run the node {shown(node['name'])}, {op}: {reason}; {_INSTEAD}"
        ) from error


# ---- arguments ----


def _map(x: Any) -> Map:
    if not isinstance(x, Map):
        raise _Refused(f"{type(x).__name__} instead of a map of floats")
    return x


def _image_map(x: Any) -> Map:
    if _map(x).is_flat:
        raise _Refused("a result of one axis instead of a map")
    return _map(x)


def _floats(x: Any) -> Floats:
    if not isinstance(x, Tensor) or x.type != "float32":
        raise _Refused("something else than a float32 tensor of the file")
    return x.array


def _whole(number: Any, least: int) -> int:
    if type(number) is not int or not least <= number <= _LARGEST:
        raise _Refused(f"the number {shown(number)}")
    return number


def _pair(numbers: Any, least: int) -> tuple[int, int]:
    given = numbers if isinstance(numbers, list) else [numbers]
    if len(given) not in (1, 2):
        raise _Refused(f"the numbers {shown(numbers)}")
    return _whole(given[0], least), _whole(given[-1], least)


def _number(x: Any) -> float:
    if type(x) not in (int, float):
        raise _Refused(f"{shown(x)} instead of a number")
    return float(x)


def _filled(x: Map, number: Any) -> Floats:
    return np.full(x.channels, _number(number), np.float32)


def _row(x: Map, operand: Any) -> Floats | None:
    """A number, or a tensor with one for each channel of x, as ``(channels,)``; None for a map."""
    if isinstance(operand, Map):
        return None
    if not isinstance(operand, Tensor):
        return _filled(x, operand)
    array = _floats(operand)
    axes = 2 if x.is_flat else 4
    shape = (1,) * (axes - array.ndim) + array.shape
    if len(shape) != axes or shape[0] != 1 or shape[1] not in (1, x.channels) or any(n != 1 for n in shape[2:]):
        raise _Refused(f"a tensor {array.shape} beside a map {x.shape}")
    if x.is_flat and x.height * x.width > 1 and shape[1] > 1:
        raise _Refused("a tensor beside a flattened map")
    return np.broadcast_to(array.reshape(-1), (x.channels,))


def _rows_of(x: Map, operand: Any) -> Floats:
    array = _floats(operand).reshape(-1)
    if array.size not in (1, x.channels) or (x.is_flat and x.height * x.width > 1):
        raise _Refused(f"a tensor {array.shape} for {x.channels} channels")
    return np.broadcast_to(array, (x.channels,))


def _steps(program: Any, vectors: Any, channels: int, residual: Any) -> list[Step]:
    """An epilogue of bonn-qat: pairs of a code and a row of ``vectors`` ``(rows, channels)``."""
    rows = _floats(vectors)
    if rows.ndim != 2 or rows.shape[1] != channels or not isinstance(program, list) or len(program) % 2:
        raise _Refused(f"an epilogue with vectors {rows.shape} for {channels} channels")
    steps = []
    for code, row in zip(program[::2], program[1::2], strict=True):
        if type(code) is not int or type(row) is not int or code not in ROWS or not 0 <= row <= len(rows) - ROWS[code]:
            raise _Refused(f"an epilogue with the step {shown(code)} of row {shown(row)}")
        if code == RESIDUAL and residual is None:
            raise _Refused("an epilogue that adds nothing")
        steps.append(Step(code, tuple(rows[row + i] for i in range(ROWS[code]))))
    return steps


def _residual(x: Any, shape: tuple[int, int, int]) -> Map | None:
    if x is None:
        return None
    if _image_map(x).shape != shape:
        raise _Refused(f"the sum of maps {shape} and {x.shape}")
    return _map(x)


# ---- bonn-qat's operators ----


def _unpacked(words: Any, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Int64 words -> bools of ``shape``; element i is bit i % 64 of word i // 64."""
    count = math.prod(shape)
    if not isinstance(words, Tensor) or words.type != "int64" or words.array.shape != (-(-count // 64),):
        raise _Refused(f"words that do not hold {count:,} bits")
    octets = np.ascontiguousarray(words.array).view(np.uint8)
    return np.unpackbits(octets, count=count, bitorder="little").view(np.bool_).reshape(shape)


def _unpack_signs(network: _Network, words: Any, shape: Any) -> Tensor:
    bits = _unpacked(words, tuple(_whole(n, 1) for n in shape))
    return Tensor("float32", np.where(bits, np.float32(1), np.float32(-1)))


def _geometry(numbers: Any) -> list[int]:
    if not isinstance(numbers, list) or len(numbers) != 13:
        raise _Refused("a geometry without 13 numbers")
    o, i, kh, kw, sh, sw, *_, dh, dw, groups = (_whole(number, 0) for number in numbers)
    if min(o, i, kh, kw, sh, sw, dh, dw, groups) < 1 or o % groups or i % groups:
        raise _Refused(f"the geometry {numbers}")
    if i // groups * kh * kw > _MOST_INPUTS:
        raise _Refused(f"a filter of more than {_MOST_INPUTS:,} inputs")
    return numbers


def _sign_codes(network: _Network, x: Any, thresholds: Any, geometry: Any) -> Signs:
    if _geometry(geometry)[1] != _image_map(x).channels:
        raise _Refused(f"the signs of {x.channels} channels for {geometry[1]}")
    rows = _floats(thresholds)
    if rows.shape != (2, x.channels):
        raise _Refused(f"thresholds {rows.shape} for {x.channels} channels")
    return Signs(x, rows)


def _binary_conv2d(
    network: _Network, codes: Any, words: Any, geometry: Any, program: Any, vectors: Any, residual: Any
) -> Map:
    o, i, kh, kw, sh, sw, top, bottom, left, right, dh, dw, groups = _geometry(geometry)
    if not isinstance(codes, Signs) or codes.map.channels != i:
        raise _Refused(f"something else than signs of {i} channels")
    shape = (
        o,
        convolved_size(codes.map.height, kh, sh, top + bottom, dh),
        convolved_size(codes.map.width, kw, sw, left + right, dw),
    )
    convolution = Convolution(
        codes, weight=_unpacked(words, (o, i // groups, kh, kw)), stride=(sh, sw), padding=(top, bottom, left, right),
        dilation=(dh, dw), groups=groups,
    )  # fmt: skip
    steps, beside = _steps(program, vectors, o, residual), _residual(residual, shape)
    return _with_epilogue(network, convolution, shape, steps, beside)


def _with_epilogue(
    network: _Network, convolution: Convolution, shape: tuple[int, int, int], steps: list[Step], residual: Map | None
) -> Map:
    if not convolution.is_ragged:
        convolution.steps, convolution.residual = steps, residual
        return network.add(convolution, shape)
    y = network.add(convolution, shape)
    return network.pointwise(y, steps, residual) if steps else y


def _binary_conv2d_sign(network: _Network, *args: Any) -> Signs:
    return _sign_codes(network, _binary_conv2d(network, *args[:6]), *args[6:])


def _binary_conv2d_and_sign(network: _Network, *args: Any) -> tuple[Map, Signs]:
    signs = _binary_conv2d_sign(network, *args)
    return signs.map, signs


def _elementwise(network: _Network, x: Any, program: Any, vectors: Any, residual: Any) -> Map:
    steps = _steps(program, vectors, _image_map(x).channels, residual)
    return network.pointwise(x, steps, _residual(residual, x.shape))


# ---- torch's operators ----


def _conv2d(
    network: _Network,
    x: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: Any = 1,
) -> Map:
    w = _floats(weight)
    if w.ndim != 4 or _image_map(x).channels != w.shape[1] * _whole(groups, 1) or len(w) % groups:
        raise _Refused(f"weights {w.shape} in {groups} groups for {x.channels} channels")
    (sh, sw), (dh, dw) = _pair(stride, 1), _pair(dilation, 1)
    kh, kw = w.shape[2:]
    if padding in ("same", "valid"):
        totals = [d * (k - 1) if padding == "same" else 0 for d, k in ((dh, kh), (dw, kw))]
        top, left = totals[0] // 2, totals[1] // 2
        sides = (top, totals[0] - top, left, totals[1] - left)
    else:
        ph, pw = _pair(padding, 0)
        sides = (ph, ph, pw, pw)
    convolution = Convolution(x, weight=w, stride=(sh, sw), padding=sides, dilation=(dh, dw), groups=groups)
    shape = (
        len(w),
        convolved_size(x.height, kh, sh, sides[0] + sides[1], dh),
        convolved_size(x.width, kw, sw, sides[2] + sides[3], dw),
    )
    steps = [] if bias is None else [Step(ADD, (_bias(bias, len(w)),))]
    return _with_epilogue(network, convolution, shape, steps, None)


def _bias(bias: Any, outputs: int) -> Floats:
    row = _floats(bias)
    if row.shape != (outputs,):
        raise _Refused(f"a bias {row.shape} for {outputs} outputs")
    return row


def _linear(network: _Network, x: Any, weight: Any, bias: Any = None) -> Map:
    w = _floats(weight)
    if not _map(x).is_flat or w.ndim != 2 or w.shape[1] != math.prod(x.shape):
        raise _Refused(f"weights {w.shape} for an input {x.shape}")
    # Torch has a flattened map channel by channel: these are the kernels of a convolution as large as the map.
    convolution = Convolution(x, weight=w.reshape(len(w), *x.shape))
    if bias is not None:
        convolution.steps.append(Step(ADD, (_bias(bias, len(w)),)))
    return network.add(convolution, (len(w), 1, 1), is_flat=True)


def _add(network: _Network, a: Any, b: Any) -> Map:
    x, other = (a, b) if isinstance(a, Map) else (b, a)
    row = _row(_map(x), other)
    if row is not None:
        return network.pointwise(x, [Step(ADD, (row,))])
    if (x.shape, x.is_flat) != (other.shape, other.is_flat):
        raise _Refused(f"the sum of maps {x.shape} and {other.shape}")
    # The later one is more likely to be computed in the same pass.
    return network.pointwise(other, [Step(RESIDUAL)], x)


def _sub(network: _Network, x: Any, other: Any) -> Map:
    row = _row(_map(x), other)
    if row is None:
        raise _Refused("the difference of two maps")
    return network.pointwise(x, [Step(ADD, (-row,))])


def _mul(network: _Network, a: Any, b: Any) -> Map:
    x, other = (a, b) if isinstance(a, Map) else (b, a)
    row = _row(_map(x), other)
    if row is None:
        raise _Refused("the product of two maps")
    return network.pointwise(x, [Step(SCALE, (row,))])


def _batch_norm(
    network: _Network, x: Any, weight: Any, bias: Any, mean: Any, variance: Any, training: Any, momentum: Any, eps: Any,
    *rest: Any,
) -> Map:  # fmt: skip
    if training:
        raise _Refused("statistics of the batch")
    factor = np.float32(1) / np.sqrt(_rows_of(_map(x), variance) + np.float32(_number(eps)))
    if weight is not None:
        factor = factor * _rows_of(x, weight)
    offset = -_rows_of(x, mean) * factor
    if bias is not None:
        offset = _rows_of(x, bias) + offset
    return network.pointwise(x, [Step(FMA, (factor.astype(np.float32), offset.astype(np.float32)))])


def _prelu(network: _Network, x: Any, slope: Any) -> Map:
    return network.pointwise(_map(x), [Step(PRELU, (_rows_of(x, slope),))])


def _leaky_relu(network: _Network, x: Any, slope: Any = 0.01) -> Map:
    return network.pointwise(_map(x), [Step(PRELU, (_filled(x, slope),))])


def _clamp(network: _Network, x: Any, least: Any = None, most: Any = None) -> Map:
    bounds = (-math.inf if least is None else least, math.inf if most is None else most)
    return network.pointwise(_map(x), [Step(CLAMP, tuple(_filled(x, bound) for bound in bounds))])


def _relu(network: _Network, x: Any) -> Map:
    return _clamp(network, x, 0.0)


def _hardtanh(network: _Network, x: Any, least: Any = -1.0, most: Any = 1.0) -> Map:
    return _clamp(network, x, least, most)


def _windows(size: int, kernel: int, stride: int, padding: int, dilation: int, is_ceil: bool) -> NDArray[np.int64]:
    """First, last + 1, and elements with the padding, of the windows of a pool."""
    if 2 * padding > kernel:
        raise _Refused(f"padding {padding} for a window of {kernel}")
    room = size + 2 * padding - dilation * (kernel - 1) - 1
    count = (-(-room // stride) if is_ceil else room // stride) + 1
    if is_ceil and (count - 1) * stride >= size + padding:
        count -= 1
    if room < 0 or count > _LARGEST:
        raise _Refused(f"a window of {kernel} in {size} pixels")
    begin = np.arange(count) * stride - padding
    end = np.minimum(begin + dilation * (kernel - 1) + 1, size + padding)
    first = np.where(begin < 0, begin + -(begin // dilation) * dilation, begin)
    return np.stack((first, np.clip(end, 0, size), end - begin), 1)


def _pool(
    network: _Network, x: Any, kernel: Any, stride: Any, padding: Any, dilation: Any, is_ceil: Any,
    is_mean: bool, counts_padding: bool = True, divisor: int | None = None,
) -> Map:  # fmt: skip
    sizes, dilations = _pair(kernel, 1), _pair(dilation, 1)
    steps = sizes if stride in (None, []) else _pair(stride, 1)
    sides = zip((_image_map(x).height, x.width), sizes, steps, _pair(padding, 0), dilations, strict=True)
    rows, columns = (_windows(*side, bool(is_ceil)) for side in sides)
    for table in (rows, columns):
        if not counts_padding:
            table[:, 2] = table[:, 1] - table[:, 0]
        if divisor is not None:
            table[:, 2] = _whole(divisor, 1) if table is rows else 1
    return _pooled(network, x, rows, columns, dilations, is_mean)


def _pooled(
    network: _Network, x: Map, rows: NDArray[Any], columns: NDArray[Any], dilation: tuple[int, int], is_mean: bool
) -> Map:
    rows, columns = rows.astype(np.int32), columns.astype(np.int32)
    pool = Pool(x, rows=rows, columns=columns, dilation=dilation, is_mean=is_mean)
    return network.add(pool, (x.channels, len(rows), len(columns)))


def _max_pool2d(
    network: _Network,
    x: Any,
    kernel: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    is_ceil: Any = False,
) -> Map:
    return _pool(network, x, kernel, stride, padding, dilation, is_ceil, is_mean=False)


def _avg_pool2d(
    network: _Network, x: Any, kernel: Any, stride: Any = None, padding: Any = 0, is_ceil: Any = False,
    counts_padding: Any = True, divisor: Any = None,
) -> Map:  # fmt: skip
    return _pool(
        network, x, kernel, stride, padding, 1, is_ceil, is_mean=True, counts_padding=bool(counts_padding),
        divisor=divisor,
    )  # fmt: skip


def _adaptive_avg_pool2d(network: _Network, x: Any, size: Any) -> Map:
    rows, columns = (_even_windows(*side) for side in zip((_image_map(x).height, x.width), _pair(size, 1), strict=True))
    return _pooled(network, x, rows, columns, (1, 1), is_mean=True)


def _even_windows(length: int, count: int) -> NDArray[np.int64]:
    i = np.arange(count)
    first, last = i * length // count, -(-(i + 1) * length // count)
    return np.stack((first, last, last - first), 1)


def _mean(network: _Network, x: Any, axes: Any, keeps: Any = False) -> Map:
    if not isinstance(axes, list) or sorted(axis % 4 for axis in axes) != [2, 3]:
        raise _Refused("a mean that is not over height and width")
    return _viewed(_adaptive_avg_pool2d(network, x, 1), is_flat=not keeps)


def _flatten(network: _Network, x: Any, start: Any = 0, end: Any = -1) -> Map:
    axes = 2 if _map(x).is_flat else 4
    if type(start) is not int or type(end) is not int or start % axes != 1 or end % axes != axes - 1:
        raise _Refused(f"flattening from axis {shown(start)} to {shown(end)}")
    return _viewed(x, is_flat=True)


def _viewed(x: Map, is_flat: bool) -> Map:
    if x.is_flat == is_flat:
        return x
    if x.source is None:
        raise _Refused("the images as one axis")
    return Map(*x.shape, x.source, is_flat)


def _view(network: _Network, x: Any, shape: Any) -> Map:
    count = math.prod(_map(x).shape)
    rest = shape[1:]
    is_whole = isinstance(shape[0], _Batch) or shape[0] == -1
    if is_whole and (rest == [count] or (rest == [-1] and shape[0] != -1)):
        return _viewed(x, is_flat=True)
    if is_whole and x.is_flat and rest in ([*x.shape], [-1, 1, 1] if x.height * x.width == 1 else None):
        return _viewed(x, is_flat=False)
    raise _Refused(f"a map {x.shape} in another shape")


def _size(network: _Network, x: Any, axis: Any) -> Any:
    shape = [_Batch(), *([math.prod(_map(x).shape)] if x.is_flat else x.shape)]
    return shape[axis]


def _item(network: _Network, items: Any, index: Any) -> Any:
    if not isinstance(items, tuple):
        raise _Refused("an item of something that has none")
    return items[index]


def _same(network: _Network, x: Any, *rest: Any) -> Map:
    return _map(x)


def _dropout(network: _Network, x: Any, share: Any, is_training: Any) -> Map:
    if is_training:
        raise _Refused("random numbers")
    return _map(x)


_IDENTITIES = ("aten.clone.default", "aten.alias.default", "aten.detach.default", "aten.contiguous.default")

LOWERINGS: Mapping[str, Callable[..., Any]] = {
    "bonn_qat.sign_codes.default": _sign_codes,
    "bonn_qat.binary_conv2d.default": _binary_conv2d,
    "bonn_qat.binary_conv2d_sign.default": _binary_conv2d_sign,
    "bonn_qat.binary_conv2d_and_sign.default": _binary_conv2d_and_sign,
    "bonn_qat.elementwise.default": _elementwise,
    "bonn_qat.max_pool2d.default": _max_pool2d,
    "bonn_qat.unpack_signs.default": _unpack_signs,
    "python.getitem": _item,
    "aten.conv2d.default": _conv2d,
    "aten.conv2d.padding": _conv2d,
    "aten.linear.default": _linear,
    "aten.add.Tensor": _add,
    "aten.sub.Tensor": _sub,
    "aten.mul.Tensor": _mul,
    "aten.batch_norm.default": _batch_norm,
    "aten.prelu.default": _prelu,
    "aten.leaky_relu.default": _leaky_relu,
    "aten.relu.default": _relu,
    "aten.hardtanh.default": _hardtanh,
    "aten.clamp.default": _clamp,
    "aten.max_pool2d.default": _max_pool2d,
    "aten.avg_pool2d.default": _avg_pool2d,
    "aten.adaptive_avg_pool2d.default": _adaptive_avg_pool2d,
    "aten.mean.dim": _mean,
    "aten.flatten.using_ints": _flatten,
    "aten.view.default": _view,
    "aten.reshape.default": _view,
    "aten.sym_size.int": _size,
    "aten.dropout.default": _dropout,
    **dict.fromkeys(_IDENTITIES, _same),
}
