"""Epilogues: an operator of torch after a convolution as one step of :mod:`bonn_qat.runtime.epilogue`.

Each function of ``STEPS`` is given a network, a node y ``(B, O, H, W)`` and the operator that takes it, and returns the
step, or None where the operator is none that an epilogue can do.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from bonn_qat.packing.network import Network, Value
from bonn_qat.runtime import epilogue

aten = torch.ops.aten


class Step(NamedTuple):
    """An operation of an epilogue, the rows ``(O,)`` that it takes, and what it adds, a node as large as y."""

    operation: int
    rows: tuple[Tensor, ...] = ()
    residual: fx.Node | None = None


def _scale(network: Network, y: fx.Node, user: fx.Node) -> Step | None:
    """``y * row``"""
    row = _per_channel(network, y, _other(y, user))
    return None if row is None else Step(epilogue.SCALE, (row,))


def _add(network: Network, y: fx.Node, user: fx.Node) -> Step | None:
    """``y + row``, or ``y + residual``"""
    other = _other(y, user)
    if (row := _per_channel(network, y, other)) is not None:
        return Step(epilogue.ADD, (row,))
    is_alike = isinstance(other, fx.Node) and other.meta.get("val") == Value(value_of(y).shape, torch.float32)
    return Step(epilogue.RESIDUAL, residual=other) if is_alike else None


def _subtract(network: Network, y: fx.Node, user: fx.Node) -> Step | None:
    """``y + (-row)``"""
    row = _per_channel(network, y, _other(y, user)) if user.args[0] is y else None
    return None if row is None else Step(epilogue.ADD, (-row,))


def batch_norm(network: Network, y: fx.Node, user: fx.Node) -> Step | None:
    """``fma(y, factor, offset)``, ``factor = weight / sqrt(variance + eps)``, ``offset = bias - mean * factor``"""
    _, weight, bias, mean, variance = (network.constant(argument) for argument in user.args[:5])
    is_training, eps = user.args[5], user.args[7]
    if mean is None or variance is None or is_training or user.args[0] is not y:
        return None
    # From torch's kernel itself, so that both are rounded as it rounds them.
    ones, zeros = torch.ones(1, len(mean), 1, 1), torch.zeros(1, len(mean), 1, 1)
    factor = F.batch_norm(ones, torch.zeros_like(mean), variance, weight, None, eps=eps).flatten()  # type: ignore[arg-type]
    offset = F.batch_norm(zeros, mean, variance, weight, bias, eps=eps).flatten()  # type: ignore[arg-type]
    return Step(epilogue.FMA, (factor, offset))


def _prelu(network: Network, y: fx.Node, user: fx.Node) -> Step | None:
    """``y if y > 0 else y * slope``"""
    slope = network.constant(user.args[1])
    return None if slope is None else Step(epilogue.PRELU, (slope.reshape(-1).expand(_channels(y)),))


def _leaky_relu(network: Network, y: fx.Node, user: fx.Node) -> Step | None:
    """``y if y > 0 else y * slope``, one slope for all channels"""
    slope: Any = user.args[1] if len(user.args) > 1 else 0.01
    return Step(epilogue.PRELU, (_filled(y, slope),))


def _clamp(least: float, most: float) -> Callable[[Network, fx.Node, fx.Node], Step | None]:
    def clamp(network: Network, y: fx.Node, user: fx.Node) -> Step | None:
        """``min(max(y, least), most)``"""
        bounds: list[Any] = [*user.args[1:], *(least, most)[len(user.args) - 1 :]]
        if user.kwargs or not all(isinstance(bound, int | float) for bound in bounds):
            return None
        return Step(epilogue.CLAMP, tuple(_filled(y, bound) for bound in bounds))

    return clamp


STEPS: Mapping[Any, Callable[[Network, fx.Node, fx.Node], Step | None]] = {
    aten.mul.Tensor: _scale,
    aten.add.Tensor: _add,
    aten.sub.Tensor: _subtract,
    aten.batch_norm.default: batch_norm,
    aten.prelu.default: _prelu,
    aten.leaky_relu.default: _leaky_relu,
    aten.relu.default: _clamp(0.0, math.inf),
    aten.hardtanh.default: _clamp(-1.0, 1.0),
}


def value_of(node: fx.Node) -> Value:
    """Shape and type of what a node gives."""
    value: Value = node.meta["val"]
    return value


def _channels(y: fx.Node) -> int:
    channels = value_of(y).shape[1]
    assert isinstance(channels, int)
    return channels


def _filled(y: fx.Node, number: float) -> Tensor:
    return torch.full((_channels(y),), float(number))


def _other(y: fx.Node, user: fx.Node) -> Any:
    """The second operand of ``y ? other``; None, which is no operand, for ``y ? y`` and for calls with options."""
    if len(user.args) != 2 or user.kwargs or user.args[0] is user.args[1]:
        return None
    return user.args[1] if user.args[0] is y else user.args[0]


def _per_channel(network: Network, y: fx.Node, operand: Any) -> Tensor | None:
    """A number, or a tensor with one for each channel of y, as ``(O,)``."""
    if isinstance(operand, int | float):
        return _filled(y, operand)
    tensor, channels = network.constant(operand), _channels(y)
    if tensor is None or tensor.dtype != torch.float32:
        return None
    shape = [1] * (4 - tensor.ndim) + list(tensor.shape)
    if tensor.ndim > 4 or shape[0] != 1 or shape[2:] != [1, 1] or shape[1] not in (1, channels):
        return None
    return tensor.reshape(-1).expand(channels)
