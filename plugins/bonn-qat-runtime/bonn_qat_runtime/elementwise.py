"""Elementwise: lowerings of what torch does with each number alone, or with two at the same place."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from bonn_qat_runtime.builder import Builder, Refused, channel_row, filled, floats, number, rows_of, tensor
from bonn_qat_runtime.errors import shown
from bonn_qat_runtime.files import Tensor
from bonn_qat_runtime.operations import (
    ABOVE,
    ABS,
    AT_LEAST,
    AT_MOST,
    BELOW,
    CLAMP,
    ERF,
    EXP,
    FLOOR,
    FMA,
    GELU,
    GELU_TANH,
    HARDSIGMOID,
    HARDSWISH,
    MAXIMUM,
    MINIMUM,
    MINUS,
    OVER,
    PRELU,
    RECIPROCAL,
    RESIDUAL,
    ROUND,
    SCALE,
    SIGMOID,
    SIGN,
    SILU,
    SQRT,
    SQUARE,
    TANH,
    TIMES,
    Step,
)
from bonn_qat_runtime.views import View


def _unscaled(alpha: Any) -> None:
    if alpha != 1:
        raise Refused(f"a factor {shown(alpha)}")


def add(builder: Builder, a: Any, b: Any, alpha: Any = 1) -> View:
    """The sum."""
    _unscaled(alpha)
    return builder.binary(RESIDUAL, a, b)


def subtract(builder: Builder, a: Any, b: Any, alpha: Any = 1) -> View:
    """The difference."""
    _unscaled(alpha)
    if not isinstance(b, View):  # the negative of a number is exact
        return builder.binary(RESIDUAL, a, Tensor("float32", -floats(b)) if isinstance(b, Tensor) else -number(b))
    if not isinstance(a, View):
        b = builder.compact(b)
        return builder.binary(RESIDUAL, builder.pointwise(b, [Step(SCALE, (filled(b, -1),))]), a)
    return builder.binary(MINUS, a, b)


def _reversed_subtract(builder: Builder, a: Any, b: Any, alpha: Any = 1) -> View:
    return subtract(builder, b, a, alpha)


def multiply(builder: Builder, a: Any, b: Any) -> View:
    """The product."""
    return builder.binary(TIMES, a, b)


def divide(builder: Builder, a: Any, b: Any) -> View:
    """The quotient."""
    if isinstance(b, View) and type(a) in (int, float) and a == 1:
        return builder.unary(b, RECIPROCAL)
    if isinstance(a, View) and not isinstance(b, View):
        a = builder.compact(a)
        row = channel_row(a, b)
        if row is not None and bool((np.frexp(row)[0] == 0.5).all()):  # a power of two: exact
            return builder.pointwise(a, [Step(SCALE, ((1 / row).astype(np.float32),))])
    return builder.binary(OVER, a, b)


def batch_norm(
    builder: Builder, x: Any, weight: Any, bias: Any, mean: Any, variance: Any, training: Any, momentum: Any, eps: Any,
    *rest: Any,
) -> View:  # fmt: skip
    """With the statistics of the training."""
    if training:
        raise Refused("statistics of the batch")
    x = builder.channelwise(tensor(x), 1)
    factor = np.float32(1) / np.sqrt(rows_of(x, variance) + np.float32(number(eps)))
    if weight is not None:
        factor = factor * rows_of(x, weight)
    offset = -rows_of(x, mean) * factor
    if bias is not None:
        offset = rows_of(x, bias) + offset
    return builder.pointwise(x, [Step(FMA, (factor.astype(np.float32), offset.astype(np.float32)))])


def _prelu(builder: Builder, x: Any, slope: Any) -> View:
    x = builder.channelwise(tensor(x), 1) if floats(slope).size > 1 else builder.compact(tensor(x))
    return builder.pointwise(x, [Step(PRELU, (rows_of(x, slope),))])


def _leaky_relu(builder: Builder, x: Any, negative_slope: Any = 0.01) -> View:
    x = builder.compact(tensor(x))
    return builder.pointwise(x, [Step(PRELU, (filled(x, negative_slope),))])


def clamp(builder: Builder, x: Any, min: Any = None, max: Any = None) -> View:
    """Between two numbers, or none. The options have torch's names."""
    x = builder.compact(tensor(x))
    bounds = (-math.inf if min is None else min, math.inf if max is None else max)
    return builder.pointwise(x, [Step(CLAMP, tuple(filled(x, bound) for bound in bounds))])


def _clamp_max(builder: Builder, x: Any, max: Any) -> View:
    return clamp(builder, x, None, max)


def _relu(builder: Builder, x: Any) -> View:
    return clamp(builder, x, 0.0)


def _relu6(builder: Builder, x: Any) -> View:
    return clamp(builder, x, 0.0, 6.0)


def _hardtanh(builder: Builder, x: Any, min_val: Any = -1.0, max_val: Any = 1.0) -> View:
    return clamp(builder, x, min_val, max_val)


def _gelu(builder: Builder, x: Any, approximate: Any = "none") -> View:
    return builder.unary(x, GELU_TANH if approximate == "tanh" else GELU)


def power(builder: Builder, x: Any, exponent: Any) -> View:
    """Of the exponents that are roots and squares."""
    known = {0.5: (SQRT,), -0.5: (SQRT, RECIPROCAL), 2.0: (SQUARE,), -1.0: (RECIPROCAL,), 1.0: ()}
    if number(exponent) not in known:
        raise Refused(f"the exponent {shown(exponent)}")
    return builder.unary(x, *known[number(exponent)])


def _negative(builder: Builder, x: Any) -> View:
    x = builder.compact(tensor(x))
    return builder.pointwise(x, [Step(SCALE, (filled(x, -1),))])


def _unary(codes: tuple[int, ...], builder: Builder, x: Any) -> View:
    return builder.unary(x, *codes)


def _both(code: int, builder: Builder, a: Any, b: Any) -> View:
    return builder.binary(code, a, b)


def _addcmul(builder: Builder, x: Any, a: Any, b: Any, value: Any = 1) -> View:
    _unscaled(value)
    return add(builder, x, multiply(builder, a, b))


_FUNCTIONS: Mapping[str, tuple[int, ...]] = {
    "floor": (FLOOR,), "round": (ROUND,), "sign": (SIGN,),
    "abs": (ABS,), "erf": (ERF,), "exp": (EXP,), "hardsigmoid": (HARDSIGMOID,), "hardswish": (HARDSWISH,),
    "reciprocal": (RECIPROCAL,), "rsqrt": (SQRT, RECIPROCAL), "sigmoid": (SIGMOID,), "silu": (SILU,), "sqrt": (SQRT,),
    "square": (SQUARE,), "tanh": (TANH,),
}  # fmt: skip

LOWERINGS: Mapping[str, Callable[..., Any]] = {
    **{f"aten.{name}.default": functools.partial(_unary, codes) for name, codes in _FUNCTIONS.items()},
    **{f"aten.{name}.{kind}": function
       for name, function in {"add": add, "sub": subtract, "rsub": _reversed_subtract, "mul": multiply, "div": divide,
                              "true_divide": divide}.items()
       for kind in ("Tensor", "Scalar")},
    "aten.maximum.default": functools.partial(_both, MAXIMUM),
    "aten.minimum.default": functools.partial(_both, MINIMUM),
    **{f"aten.{name}.{kind}": functools.partial(_both, code)
       for name, code in {"ge": AT_LEAST, "gt": ABOVE, "le": AT_MOST, "lt": BELOW}.items()
       for kind in ("Tensor", "Scalar")},
    "aten.addcmul.default": _addcmul,
    "aten.neg.default": _negative,
    "aten.pow.Tensor_Scalar": power,
    "aten.batch_norm.default": batch_norm,
    "aten.prelu.default": _prelu,
    "aten.leaky_relu.default": _leaky_relu,
    "aten.gelu.default": _gelu,
    "aten.relu.default": _relu,
    "aten.relu6.default": _relu6,
    "aten.hardtanh.default": _hardtanh,
    "aten.clamp.default": clamp,
    "aten.clip.default": clamp,
    "aten.clamp_min.default": clamp,
    "aten.clamp_max.default": _clamp_max,
}  # fmt: skip
