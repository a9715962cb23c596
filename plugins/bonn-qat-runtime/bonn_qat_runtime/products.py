"""Products: lowerings of attention, and of what takes sums over an axis, such as means, norms and softmax."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bonn_qat_runtime.builder import Builder, Refused, filled, floats, number, rows_of, shape_of, tensor, whole
from bonn_qat_runtime.convolutions import linear, pooled
from bonn_qat_runtime.elementwise import add, multiply, power, subtract
from bonn_qat_runtime.errors import shown
from bonn_qat_runtime.files import Tensor
from bonn_qat_runtime.operations import ADD, FMA, SCALE, SQRT, SQUARE, Map, Normalize, Product, Step
from bonn_qat_runtime.views import View, laid

# ---- norms ----


def _layer_norm(
    builder: Builder, x: Any, shape: Any, weight: Any = None, bias: Any = None, eps: Any = 1e-5, *rest: Any
) -> View:
    """Of the last axes. A mean of 0 and a variance of 1, then the weight and bias of each element."""
    sizes, count = tensor(x).shape, len(shape)
    if list(sizes[len(sizes) - count :]) != list(shape) or not count:
        raise Refused(f"a norm over {shown(shape)} of a tensor {sizes}")
    rows = builder.channelwise(builder.reshaped(x, (*sizes[:-count], math.prod(sizes[-count:]))), -1)
    y = _affine(builder, _normalized(builder, rows, number(eps)), weight, bias)
    return builder.reshaped(y, sizes)


def _normalized(builder: Builder, x: View, eps: float | None) -> View:
    return View(builder.add(Normalize(x.map, eps=eps), x.map.shape), x.axes, True)


def _affine(builder: Builder, x: View, weight: Any, bias: Any) -> View:
    if weight is not None and bias is not None:
        return builder.pointwise(x, [Step(FMA, (rows_of(x, weight), rows_of(x, bias)))])
    steps = [Step(code, (rows_of(x, row),)) for code, row in ((SCALE, weight), (ADD, bias)) if row is not None]
    return builder.pointwise(x, steps) if steps else x


def _group_norm(
    builder: Builder, x: Any, groups: Any, weight: Any = None, bias: Any = None, eps: Any = 1e-5, *rest: Any
) -> View:
    """Of each group of channels with all its pixels, which are rows of their own while that lasts."""
    rows = builder.channelwise(builder.reshaped(tensor(x), (1, whole(groups, 1), -(-math.prod(x.shape) // groups))), -1)
    y = builder.reshaped(_normalized(builder, rows, number(eps)), x.shape)
    if weight is None and bias is None:
        return y
    return _affine(builder, builder.channelwise(y, 1), weight, bias)


def _rms_norm(builder: Builder, x: Any, shape: Any, weight: Any = None, eps: Any = None) -> Any:
    axes = list(range(-len(shape), 0))
    squares = reduced(builder, builder.unary(x, SQUARE), axes, keeps=True)
    factor = power(builder, add(builder, squares, 2.0**-23 if eps is None else number(eps)), -0.5)
    y = multiply(builder, x, factor)
    return y if weight is None else multiply(builder, y, weight)


def _softmax(builder: Builder, x: Any, dim: Any, *rest: Any) -> View:
    return _normalized(builder, builder.channelwise(tensor(x), dim), None)


# ---- sums ----


def reduced(
    builder: Builder, x: Any, dims: Any, keeps: Any, *, is_mean: bool = True, divisor: int | None = None
) -> View:
    """Means, or maxima, along some axes; sums with the divisor 1."""
    shape = tensor(x).shape
    every = list(range(len(shape)))
    gone = sorted({x.axis(axis) for axis in ([dims] if isinstance(dims, int) else dims or every)})
    kept = [axis for axis in every if axis not in gone]
    if not kept:
        raise Refused("a reduction to one number")
    channels = [axis for axis in kept if x.is_channel(axis)]
    channel = channels[0] if channels else kept[-1]
    pixels, count = [axis for axis in kept if axis != channel], math.prod(shape[axis] for axis in gone)
    moved = builder.mapped(x.permuted([*pixels, *gone, channel]), -1)
    rows = math.prod(shape[axis] for axis in pixels)
    i = np.arange(rows)
    y = pooled(
        builder, Map(moved.channels, rows, count, moved.source), np.stack((i, i + 1, i * 0 + 1), 1),
        np.array([[0, count, divisor or count]]), (1, 1), is_mean,
    )  # fmt: skip
    order = [*pixels, channel]
    made = laid(y, [shape[axis] for axis in order]).permuted([order.index(axis) for axis in kept])
    return builder.reshaped(made, [1 if axis in gone else shape[axis] for axis in every]) if keeps else made


def _mean(builder: Builder, x: Any, dim: Any, keepdim: Any = False, dtype: Any = None) -> View:
    return reduced(builder, x, dim, keepdim)


def _sum(builder: Builder, x: Any, dim: Any, keepdim: Any = False, dtype: Any = None) -> View:
    return reduced(builder, x, dim, keepdim, divisor=1)


def _amax(builder: Builder, x: Any, dim: Any = (), keepdim: Any = False) -> View:
    return reduced(builder, x, dim, keepdim, is_mean=False)


def _max(builder: Builder, x: Any, dim: Any, keepdim: Any = False) -> tuple[View]:
    return (_amax(builder, x, dim, keepdim),)


def _variance_and_mean(builder: Builder, x: Any, dim: Any, correction: Any, keepdim: Any) -> tuple[View, View]:
    mean = reduced(builder, x, dim, keeps=True)
    count = math.prod(tensor(x).shape) // math.prod(mean.shape)
    squares = builder.unary(subtract(builder, x, mean), SQUARE)
    variance = reduced(
        builder, squares, dim, keepdim, divisor=count - whole(1 if correction is None else correction, 0)
    )
    return variance, mean if keepdim else builder.reshaped(mean, variance.shape)


def _var(builder: Builder, x: Any, dim: Any = None, correction: Any = None, keepdim: Any = False) -> View:
    return _variance_and_mean(builder, x, dim, correction, keepdim)[0]


def _std(builder: Builder, x: Any, dim: Any = None, correction: Any = None, keepdim: Any = False) -> View:
    return builder.unary(_var(builder, x, dim, correction, keepdim), SQRT)


def _var_mean(builder: Builder, x: Any, dim: Any = None, correction: Any = None, keepdim: Any = False) -> Any:
    return _variance_and_mean(builder, x, dim, correction, keepdim)


def _std_mean(builder: Builder, x: Any, dim: Any = None, correction: Any = None, keepdim: Any = False) -> Any:
    variance, mean = _variance_and_mean(builder, x, dim, correction, keepdim)
    return builder.unary(variance, SQRT), mean


def _vector_norm(
    builder: Builder, x: Any, ord: Any = 2, dim: Any = None, keepdim: Any = False, dtype: Any = None
) -> View:
    if number(ord) != 2:
        raise Refused(f"the order {shown(ord)}")
    return builder.unary(reduced(builder, builder.unary(x, SQUARE), dim, keepdim, divisor=1), SQRT)


# ---- products of matrices ----


def matmul(builder: Builder, a: Any, b: Any) -> View:
    """Of the last two axes, for all indices of the others."""
    if isinstance(b, Tensor) and floats(b).ndim == 2:
        return linear(builder, a, Tensor("float32", np.ascontiguousarray(b.array.T)))
    a, b = (x if isinstance(x, View) else builder.constant(x, shape_of(x)) for x in (a, b))
    if len(a.axes) < 2 or len(b.axes) < 2 or a.shape[-1] != b.shape[-2]:
        raise Refused(f"the product of matrices {a.shape} and {b.shape}")
    batch = tuple(np.broadcast_shapes(a.shape[:-2], b.shape[:-2]))
    if bool((np.diff(b.axes[-1]) != 1).any()):
        b = builder.copied(b, -1)
    first, second = (_batches(x, batch) for x in (a, b))
    size = (b.shape[-1], len(first), a.shape[-2])
    operation = Product(
        a.map, other=b.map, first=first, rows=a.axes[-2], depth=a.axes[-1], second=second + b.axes[-1][0],
        across=b.axes[-2],
    )  # fmt: skip
    return laid(builder.add(operation, size), (*batch, a.shape[-2], b.shape[-1]))


def _batches(x: View, batch: tuple[int, ...]) -> NDArray[np.int64]:
    outer = View(x.map, x.axes[:-2]).expanded(batch)
    return np.asarray(outer.places(), np.int64).reshape(-1)


def _einsum(builder: Builder, equation: Any, operands: Any, path: Any = None) -> View:
    """Of two operands with letters alone: shared letters that are returned, summed ones, and those of one operand."""
    given, _, result = equation.replace(" ", "").partition("->")
    letters = given.split(",")
    if len(letters) != 2 or len(operands) != 2 or not (given + result).replace(",", "").isalpha():
        raise Refused(f"the equation {shown(equation)}")
    a, b = (x if isinstance(x, View) else builder.constant(x, shape_of(x)) for x in operands)
    own = [set(part) for part in letters]
    if any(len(set(part)) != len(part) for part in [*letters, result]):
        raise Refused(f"the equation {shown(equation)}")
    lengths = dict(zip(letters[0] + letters[1], a.shape + b.shape, strict=True))
    batch = [letter for letter in result if letter in own[0] & own[1]]
    summed = [letter for letter in letters[0] if letter in own[1] and letter not in result]
    left, right = ([letter for letter in result if letter in own[k] - own[1 - k]] for k in (0, 1))
    if set(batch + summed + left + right) != own[0] | own[1] or not set(result) <= own[0] | own[1]:
        raise Refused(f"the equation {shown(equation)}")

    def count(some: list[str]) -> int:
        return math.prod(lengths[letter] for letter in some)

    sizes = [count(batch), count(left), count(summed), count(right)]
    a = a.permuted([letters[0].index(letter) for letter in batch + left + summed])
    b = b.permuted([letters[1].index(letter) for letter in batch + summed + right])
    y = matmul(builder, builder.reshaped(a, sizes[:3]), builder.reshaped(b, [sizes[0], *sizes[2:]]))
    order = batch + left + right
    y = builder.reshaped(y, [lengths[letter] for letter in order])
    return y.permuted([order.index(letter) for letter in result])


def _addmm(builder: Builder, x: Any, a: Any, b: Any, beta: Any = 1, alpha: Any = 1) -> Any:
    if beta != 1 or alpha != 1:
        raise Refused("factors")
    return add(builder, matmul(builder, a, b), x)


def _attention(
    builder: Builder, query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: Any = 0.0,
    is_causal: Any = False, scale: Any = None, enable_gqa: Any = False,
) -> View:  # fmt: skip
    """``softmax(query key^T scale + mask) value``"""
    if is_causal or enable_gqa or dropout_p:
        raise Refused("an attention of this kind")
    turned = list(range(len(tensor(key).axes)))
    turned[-2:] = turned[:-3:-1]
    scores = matmul(builder, query, key.permuted(turned))
    factor = 1 / math.sqrt(tensor(query).shape[-1]) if scale is None else scale
    scores = builder.pointwise(scores, [Step(SCALE, (filled(scores, factor),))])
    if isinstance(attn_mask, Tensor) and attn_mask.type == "bool":
        attn_mask = Tensor("float32", np.where(attn_mask.array, np.float32(0), np.float32(-math.inf)))
    if attn_mask is not None:
        scores = tensor(add(builder, scores, attn_mask))
    return matmul(builder, _softmax(builder, scores, -1), value)


LOWERINGS: Mapping[str, Callable[..., Any]] = {
    "aten.layer_norm.default": _layer_norm,
    "aten.group_norm.default": _group_norm,
    "aten.rms_norm.default": _rms_norm,
    "aten.softmax.int": _softmax,
    "aten._softmax.default": _softmax,
    "aten.mean.dim": _mean,
    "aten.sum.dim_IntList": _sum,
    "aten.amax.default": _amax,
    "aten.max.dim": _max,
    "aten.var.correction": _var,
    "aten.std.correction": _std,
    "aten.var_mean.correction": _var_mean,
    "aten.std_mean.correction": _std_mean,
    "aten.linalg_vector_norm.default": _vector_norm,
    **{f"aten.{name}.default": matmul for name in ("matmul", "bmm", "mm")},
    "aten.addmm.default": _addmm,
    "aten.einsum.default": _einsum,
    "aten.scaled_dot_product_attention.default": _attention,
}
