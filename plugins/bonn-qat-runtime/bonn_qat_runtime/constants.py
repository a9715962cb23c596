"""Constants: what a network computes without its images, such as positions and 1-bit weights with their scale."""

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bonn_qat_runtime.builder import Refused
from bonn_qat_runtime.errors import shown
from bonn_qat_runtime.files import Tensor

Array = NDArray[Any]
_MOST_NUMBERS = 2**26
_TYPES = ("bool", "int32", "int64", "float32", "float64")


def fold(op: str, args: Sequence[Any], options: Mapping[str, Any]) -> Any:
    """The result of an operator on constants alone. Raises Refused for one of too many numbers."""
    function = FUNCTIONS[op]
    options = {key: value for key, value in options.items() if key not in ("device", "pin_memory", "layout")}
    given = [_array(arg) for arg in args]
    with np.errstate(all="ignore"):
        return _tensor(function(*given, **options), any(_is_double(arg) for arg in [*given, *options.values()]))


def _array(arg: Any) -> Any:
    if isinstance(arg, Tensor):
        if arg.type not in _TYPES:
            raise Refused(f"constants of the type {arg.type}")
        return arg.array
    return [_array(item) for item in arg] if isinstance(arg, list | tuple) else arg


def _is_double(value: Any) -> bool:
    return value == "float64" if isinstance(value, str) else isinstance(value, np.ndarray) and value.dtype == np.float64


def _tensor(value: Any, is_double: bool) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_tensor(item, is_double) for item in value)
    found = np.asarray(value)
    if found.dtype == np.float64 and not is_double:  # as torch, which knows no mean of whole numbers but float32
        found = found.astype(np.float32)
    if found.dtype.name not in _TYPES or not found.size:
        raise Refused(f"constants of the type {found.dtype} and the shape {found.shape}")
    return Tensor(found.dtype.name, found)


def _bounded(shape: Any) -> list[int]:
    sizes = [shape] if isinstance(shape, int) else list(shape)
    if not all(type(n) is int and n >= 0 for n in sizes) or math.prod(sizes) > _MOST_NUMBERS:
        raise Refused(f"constants of the shape {shown(shape)}")
    return sizes


def _full(size: Any, value: Any, dtype: Any = "float32") -> Array:
    return np.full(_bounded(size), value, dtype or "float32")


def _zeros(size: Any, dtype: Any = "float32") -> Array:
    return _full(size, 0, dtype)


def _ones(size: Any, dtype: Any = "float32") -> Array:
    return _full(size, 1, dtype)


def _like(value: Any) -> Callable[..., Array]:
    return lambda x, dtype=None, **rest: np.full(x.shape, value, dtype or x.dtype)


def _new(value: Any) -> Callable[..., Array]:
    return lambda x, size, dtype=None: np.full(_bounded(size), value, dtype or x.dtype)


def _range(*numbers: Any, dtype: Any = None) -> Array:
    start, end, step = (0, *numbers, 1) if len(numbers) == 1 else (*numbers, 1) if len(numbers) == 2 else numbers
    _bounded(max(0, math.ceil((end - start) / step)))
    is_whole = all(isinstance(number, int) for number in numbers)
    return np.asarray(np.arange(start, end, step), dtype or ("int64" if is_whole else "float32"))


def _cast(x: Array, dtype: Any = None, **rest: Any) -> Array:
    return x if dtype is None else np.asarray(x, dtype)


def _binary(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def of_both(a: Any, b: Any) -> Any:
        _bounded([*np.broadcast_shapes(np.shape(a), np.shape(b))])
        return function(a, b)

    return of_both


def _divide(a: Any, b: Any, rounding_mode: str | None = None) -> Any:
    rounded: Mapping[Any, Callable[[Any], Any]] = {None: np.asarray, "floor": np.floor, "trunc": np.trunc}
    whole = rounded[rounding_mode](np.true_divide(a, b))
    kept = [x.dtype for x in (a, b) if isinstance(x, np.ndarray)]
    is_whole = rounding_mode is not None and all(kind.kind in "iu" for kind in kept) and not isinstance(b, float)
    return whole.astype(np.int64) if is_whole else whole


def _select_scatter(x: Array, source: Array, dim: int, index: int) -> Array:
    made = x.copy()
    np.moveaxis(made, dim, 0)[index] = source
    return made


def _expand(x: Array, size: Any, **rest: Any) -> Array:
    missing = len(size) - x.ndim
    return np.broadcast_to(x, _bounded([x.shape[k - missing] if n == -1 else n for k, n in enumerate(size)]))


def _slice(x: Array, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Array:
    places = [slice(None)] * x.ndim
    places[dim] = slice(start, end, step)
    return x[tuple(places)]


def _repeat(x: Array, repeats: Any) -> Array:
    _bounded([*repeats, x.size])
    return np.tile(x, repeats)


def _repeat_interleave(x: Array, repeats: int, dim: int | None = None, **rest: Any) -> Array:
    _bounded([repeats, x.size])
    return np.repeat(x, repeats, dim)


def _flatten(x: Array, start_dim: int = 0, end_dim: int = -1) -> Array:
    axes = range(x.ndim)
    first, last = axes[start_dim], axes[end_dim]
    return x.reshape(*x.shape[:first], -1, *x.shape[last + 1 :])


def _split(x: Array, sizes: Any, dim: int = 0) -> list[Array]:
    places = range(sizes, x.shape[dim], sizes) if isinstance(sizes, int) else np.cumsum(sizes)[:-1].tolist()
    return np.split(x, list(places), dim)


def _index(x: Array, indices: Any) -> Array:
    found = [slice(None) if index is None else index for index in indices]
    if any(np.asarray(index).dtype.kind != "i" for index in indices if index is not None):
        raise Refused("indices that are no whole numbers")
    _bounded([x.size, *np.broadcast_shapes(*(np.shape(index) for index in indices if index is not None))])
    return np.asarray(x[tuple(found)])


def _unbind(x: Array, dim: int = 0) -> list[Array]:
    return [x.take(index, dim) for index in range(x.shape[dim])]


def _same(x: Any, *rest: Any, **options: Any) -> Any:
    return x


_UNARY: Mapping[str, Callable[..., Any]] = {
    "abs": np.abs, "bitwise_not": np.invert, "ceil": np.ceil, "cos": np.cos, "exp": np.exp, "floor": np.floor,
    "log": np.log, "log2": np.log2, "logical_not": np.logical_not, "neg": np.negative, "reciprocal": lambda x: 1 / x,
    "rsqrt": lambda x: 1 / np.sqrt(x), "sin": np.sin, "sqrt": np.sqrt, "square": np.square, "tanh": np.tanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
}  # fmt: skip
_BINARY: Mapping[str, Callable[..., Any]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv, "rsub": lambda a, b: b - a,
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
}  # fmt: skip
FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    **{f"aten.{name}.default": function for name, function in _UNARY.items()},
    **{f"aten.{name}.{kind}": _binary(function) for name, function in _BINARY.items() for kind in ("Tensor", "Scalar")},
    "aten.div.Tensor_mode": _divide,
    "aten.where.self": lambda condition, a, b: np.where(condition, a, b),
    "aten.pow.Scalar": _binary(operator.pow),
    "aten.pow.Tensor_Scalar": _binary(operator.pow),
    "aten.pow.Tensor_Tensor": _binary(operator.pow),
    **{f"aten.{name}.default": _same for name in ("clone", "alias", "detach", "contiguous", "lift_fresh_copy")},
    "aten._to_copy.default": _cast,
    "aten.zeros.default": _zeros,
    "aten.ones.default": _ones,
    "aten.full.default": _full,
    "aten.zeros_like.default": _like(0),
    "aten.ones_like.default": _like(1),
    "aten.new_zeros.default": _new(0),
    "aten.new_ones.default": _new(1),
    **{f"aten.arange.{kind}": _range for kind in ("default", "start", "start_step")},
    "aten.view.default": lambda x, shape: x.reshape(shape),
    "aten.reshape.default": lambda x, shape: x.reshape(shape),
    "aten.flatten.using_ints": _flatten,
    "aten.unsqueeze.default": np.expand_dims,
    "aten.squeeze.dim": lambda x, dim: x.squeeze(dim) if x.shape[dim] == 1 else x,
    "aten.permute.default": np.transpose,
    "aten.transpose.int": np.swapaxes,
    "aten.t.default": np.transpose,
    "aten.expand.default": _expand,
    "aten.slice.Tensor": _slice,
    "aten.select.int": lambda x, dim, index: x.take(index, dim),
    "aten.select_scatter.default": _select_scatter,
    "aten.copy.default": lambda x, source, *rest: np.broadcast_to(source, x.shape),
    "aten.unbind.int": _unbind,
    "aten.split.Tensor": _split,
    "aten.split_with_sizes.default": _split,
    "aten.index.Tensor": _index,
    "aten.repeat.default": _repeat,
    "aten.repeat_interleave.self_int": _repeat_interleave,
    "aten.roll.default": np.roll,
    "aten.flip.default": np.flip,
    "aten.cat.default": lambda tensors, dim=0: np.concatenate(tensors, dim),
    "aten.stack.default": lambda tensors, dim=0: np.stack(tensors, dim),
    "aten.cumsum.default": lambda x, dim, dtype=None: np.cumsum(x, dim, dtype=dtype),
}
