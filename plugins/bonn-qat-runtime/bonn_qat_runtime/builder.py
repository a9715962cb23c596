"""Builder: what the lowerings of operators share: arguments, and operations that put maps into the order they need."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bonn_qat_runtime.errors import InvalidFile, shown
from bonn_qat_runtime.files import PackedFile, Tensor
from bonn_qat_runtime.operations import (
    ADD,
    MAXIMUM,
    MINIMUM,
    RESIDUAL,
    SCALE,
    TIMES,
    Arrange,
    Floats,
    Map,
    Operation,
    Part,
    Pointwise,
    Step,
)
from bonn_qat_runtime.views import View, laid

LARGEST = 2**20
_MOST_ELEMENTS = 2**31  # of a map, or of weights
_SYMMETRIC = (RESIDUAL, TIMES, MAXIMUM, MINIMUM)


class Refused(Exception):
    """Arguments that an operator of this runtime does not take."""


class Builder:
    """The values of the nodes so far, and the operations that compute them, for one image."""

    def __init__(self, file: PackedFile) -> None:
        self.file = file
        self.values: dict[str, Any] = {}
        self.operations: list[Operation] = []

    def add(self, operation: Operation, shape: tuple[int, int, int]) -> Map:
        """The result of a new operation."""
        if min(shape) < 1 or math.prod(shape) > _MOST_ELEMENTS:
            raise Refused(f"a result of {shape}")
        operation.result = Map(*shape, operation)
        self.operations.append(operation)
        return operation.result

    def arrange(self, parts: list[Part], shape: tuple[int, int, int]) -> Map:
        """A map put together from parts of others."""
        sources = [part.source for part in parts if isinstance(part.source, Map)]
        return self.add(Arrange(sources[0] if sources else Map(*shape), parts=parts), shape)

    def compact(self, view: View) -> View:
        """The same tensor as all of a map, which may be another one."""
        if view.is_whole:
            return view
        contiguous = [k for k, axis in enumerate(view.axes) if len(axis) > 1 and (np.diff(axis) == 1).all()]
        return self.copied(view, contiguous[-1] if contiguous else -1)

    def copied(self, view: View, channel: int) -> View:
        """The same tensor in a map of its own, whose channels are one axis."""
        channel = view.axis(channel) if view.axes else 0
        shape = view.shape or (1,)
        rest = [n for k, n in enumerate(shape) if k != channel]
        size = (shape[channel], math.prod(rest[:-1]), rest[-1] if rest else 1)
        if math.prod(size) > _MOST_ELEMENTS:
            raise Refused(f"a result of {size}")
        made = laid(Map(*size), shape, channel)
        part = Part(view.map, view.axes or (np.zeros(1, np.int64),), made.axes)
        return View(self.arrange([part], size), made.axes if view.axes else (), True)

    def mapped(self, view: View, channel: int = 1) -> Map:
        """The map whose channels are one axis, and whose pixels are the others in their order."""
        if not view.axes:
            raise Refused("a number instead of a map")
        channel = view.axis(channel)
        rest = [n for k, n in enumerate(view.shape) if k != channel]
        size = (view.shape[channel], math.prod(rest[:-1]), rest[-1] if rest else 1)
        if view.is_channel(channel):
            wanted = laid(Map(*size), view.shape, channel)
            if all(np.array_equal(*pair) for pair in zip(wanted.axes, view.axes, strict=True)):
                return Map(*size, view.map.source)
        return self.copied(view, channel).map

    def channelwise(self, view: View, channel: int) -> View:
        """The same tensor as all of a map whose channels are one axis; its pixels may have any order."""
        return view if view.is_channel(view.axis(channel)) else self.copied(view, channel)

    def reshaped(self, view: View, shape: Sequence[int]) -> View:
        """The same elements with other axes."""
        made = view.reshaped(shape)
        if made is None:
            made = self.copied(view, -1).reshaped(shape)
        if made is None:  # channels that do not fill their vectors: with the wanted last axis as the new channels
            return self._flowed(view, shape)
        return made

    def _flowed(self, view: View, shape: Sequence[int]) -> View:
        rest = shape[:-1]
        made = laid(Map(shape[-1], math.prod(rest[:-1]), rest[-1] if rest else 1), shape)
        parts = [Part(view.map, (view.places().reshape(-1),), (made.places().reshape(-1),))]
        return View(self.arrange(parts, made.map.shape), made.axes, True)

    def pointwise(self, view: View, steps: list[Step], residual: Map | None = None) -> View:
        """The epilogue of a tensor that is all of a map."""
        x = view.map
        return View(self.add(Pointwise(x, steps=steps, residual=residual), x.shape), view.axes, True)

    def unary(self, x: Any, *codes: int) -> View:
        """Functions of each element."""
        return self.pointwise(self.compact(tensor(x)), [Step(code) for code in codes])

    def binary(self, code: int, a: Any, b: Any) -> View:
        """``a`` and ``b`` element by element, for a step that takes a residual; one may be a constant."""
        if not isinstance(a, View):
            if code not in _SYMMETRIC:
                a = self.constant(a, tensor(b).shape)
            else:
                a, b = b, a
        shape = tuple(np.broadcast_shapes(tensor(a).shape, shape_of(b)))
        # As the value the one that needs no copy; the later one is more likely to be computed in the same pass.
        may_swap = isinstance(b, View) and code in _SYMMETRIC and b.shape == shape and b.is_whole
        if may_swap and (a.shape != shape or not a.is_whole or self._age(b) >= self._age(a)):
            a, b = b, a
        a = self.compact(a.expanded(shape) if a.shape != shape else a)
        if not isinstance(b, View):
            row = channel_row(a, b)
            if row is not None and code in (RESIDUAL, TIMES):
                return self.pointwise(a, [Step(ADD if code == RESIDUAL else SCALE, (row,))])
            if row is not None:
                return self.pointwise(a, [Step(code)], self.constant(Tensor("float32", row), row.shape).map)
            b = self.constant(b, shape)
        return self.pointwise(a, [Step(code)], self.beside(b.expanded(shape), a))

    def _age(self, view: View) -> int:
        return -1 if view.map.source is None else self.operations.index(view.map.source)

    def beside(self, view: View, base: View) -> Map:
        """A tensor as a residual: what lies as ``base`` does, or is the same for all of its pixels."""
        sides = list(zip(view.axes, base.axes, strict=True))
        if view.map.channels == base.map.channels:
            if view.map.pixels == base.map.pixels and all(np.array_equal(*pair) for pair in sides):
                return view.map
            pitch = base.map.pitch
            if base.map.pixels > 1 and all(np.array_equal(own, other % pitch) for own, other in sides):
                # The pixels' own axes may not have been repeated from others than the first pixel.
                return self._first_pixel(view)
        part = Part(view.map, view.axes, base.axes)
        return self.arrange([part], base.map.shape)

    def _first_pixel(self, view: View) -> Map:
        if view.map.pixels == 1:
            return view.map
        channels = np.arange(view.map.channels)
        return self.arrange([Part(view.map, (channels,), (channels,))], (view.map.channels, 1, 1))

    def constant(self, value: Any, shape: Sequence[int]) -> View:
        """A constant as a map."""
        values = np.broadcast_to(floats(value) if isinstance(value, Tensor) else np.float32(number(value)), shape)
        rest = tuple(shape[:-1])
        made = laid(Map(shape[-1] if shape else 1, math.prod(rest[:-1]), rest[-1] if rest else 1), shape)
        if not shape:
            raise Refused("a constant without axes")
        part = Part(np.ascontiguousarray(values).reshape(-1), _row_major(shape), made.axes)
        return View(self.arrange([part], made.map.shape), made.axes, True)

    def placed(
        self, parts: Sequence[tuple[Any, Sequence[int], Sequence[int]]], shape: Sequence[int], fill: float | None = None
    ) -> View:
        """A new tensor from tensors and constants, each with where it begins and its steps, on ``fill`` elsewhere."""
        channels = [k for x, _, _ in parts if isinstance(x, View) for k in range(len(shape)) if x.is_channel(k)]
        channel = channels[0] if channels else len(shape) - 1
        rest = [n for k, n in enumerate(shape) if k != channel]
        made = laid(Map(shape[channel], math.prod(rest[:-1]), rest[-1] if rest else 1), shape, channel)
        found = []
        if fill is not None:
            found.append(Part(np.array([fill], np.float32), [axis * 0 for axis in made.axes], made.axes))
        for x, begins, steps in parts:
            places = [
                axis[begin : begin + step * (n - 1) + 1 : step]
                for axis, n, begin, step in zip(made.axes, shape_of(x), begins, steps, strict=True)
            ]
            if isinstance(x, View):
                found.append(Part(x.map, x.axes, places))
            else:
                values = np.ascontiguousarray(floats(x)).reshape(-1)
                found.append(Part(values, _row_major(shape_of(x)), places))
        return View(self.arrange(found, made.map.shape), made.axes, True)

    def joined(self, tensors: Sequence[Any], axis: int = 0) -> View:
        """Tensors and constants, one after another along an axis."""
        shape, begin, parts = list(shape_of(tensors[0])), 0, []
        axis = range(len(shape))[axis]
        for x in tensors:
            own = list(shape_of(x))
            if own[:axis] + own[axis + 1 :] != shape[:axis] + shape[axis + 1 :]:
                raise Refused(f"tensors {shape} and {own} as one")
            parts.append((x, tuple(begin * (k == axis) for k in range(len(own))), (1,) * len(own)))
            begin += own[axis]
        shape[axis] = begin
        return self.placed(parts, shape)

    def decoded(self, value: Any) -> Any:
        """An argument of a node."""
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


def _row_major(shape: Sequence[int]) -> list[NDArray[np.int64]]:
    steps = [math.prod(shape[k + 1 :]) for k in range(len(shape))]
    return [np.arange(n) * step for n, step in zip(shape, steps, strict=True)]


# ---- arguments ----


def tensor(x: Any) -> View:
    """A tensor that depends on the image."""
    if not isinstance(x, View):
        raise Refused(f"{type(x).__name__} instead of floats that depend on the image")
    return x


def images(x: Any) -> View:
    """One with the axes ``(1, C, H, W)``."""
    if len(tensor(x).axes) != 4 or len(x.axes[0]) != 1:
        raise Refused(f"a tensor {tensor(x).shape} instead of images")
    return tensor(x)


def floats(x: Any) -> Floats:
    """A constant."""
    if not isinstance(x, Tensor) or x.type != "float32":
        raise Refused("something else than a float32 tensor of the file")
    return x.array


def whole(value: Any, least: int) -> int:
    """A whole number."""
    if type(value) is not int or not least <= value <= LARGEST:
        raise Refused(f"the number {shown(value)}")
    return value


def pair(numbers: Any, least: int) -> tuple[int, int]:
    """One whole number for height and width, or two."""
    given = numbers if isinstance(numbers, list) else [numbers]
    if len(given) not in (1, 2):
        raise Refused(f"the numbers {shown(numbers)}")
    return whole(given[0], least), whole(given[-1], least)


def number(x: Any) -> float:
    """A number, or a constant of one element."""
    if isinstance(x, Tensor) and x.array.size == 1 and x.type in ("float32", "float64", "int64"):
        return float(x.array.reshape(-1)[0])
    if type(x) not in (int, float):
        raise Refused(f"{shown(x)} instead of a number")
    return float(x)


def shape_of(x: Any) -> tuple[int, ...]:
    """The shape of a tensor, of a constant, or of a number."""
    return x.shape if isinstance(x, View) else x.array.shape if isinstance(x, Tensor) else ()


def filled(x: View, value: Any) -> Floats:
    """A number for each channel of the map."""
    return np.full(x.map.channels, number(value), np.float32)


def channel_row(x: View, operand: Any) -> Floats | None:
    """A constant that depends on channels alone, as ``(channels,)``, for a tensor that is all of a map; or None."""
    if not isinstance(operand, Tensor) or operand.array.size == 1:
        return filled(x, operand)
    values = floats(operand)
    values = values.reshape((1,) * (len(x.axes) - values.ndim) + values.shape)
    are_channels = [int(axis.max()) < x.map.pitch for axis in x.axes]
    if any(n > 1 and not is_channel for n, is_channel in zip(values.shape, are_channels, strict=True)):
        return None
    axes = tuple(a if is_channel else a[:1] * 0 for a, is_channel in zip(x.axes, are_channels, strict=True))
    row = np.zeros(x.map.channels, np.float32)
    row[View(x.map, axes).places()] = np.broadcast_to(values, [len(axis) for axis in axes])
    return row


def rows_of(x: View, operand: Any) -> Floats:
    """A constant with a number for each channel, or one for all."""
    values = floats(operand).reshape(-1)
    if values.size not in (1, x.map.channels):
        raise Refused(f"a tensor {values.shape} for {x.map.channels} channels")
    return np.broadcast_to(values, (x.map.channels,))
