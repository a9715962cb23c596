"""Operations: a network between the file and the plan, one object for each pass over a map.

A map has the shape ``(channels, height, width)``, for one image. Every operation that computes its values itself ends
with an *epilogue*, a list of steps, and may give the signs of its result.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

LANES = 16
(
    SCALE, ADD, FMA, RESIDUAL, PRELU, CLAMP, TIMES, MINUS, OVER, MAXIMUM, MINIMUM, AT_LEAST, ABOVE, AT_MOST, BELOW, EXP,
    SIGMOID, SILU, TANH, GELU, GELU_TANH, ERF, HARDSIGMOID, HARDSWISH, SQRT, RECIPROCAL, SQUARE, ROUND, FLOOR, SIGN,
    ABS,
) = range(31)  # fmt: skip
ROWS = {SCALE: 1, ADD: 1, FMA: 2, PRELU: 1, CLAMP: 2}  # that a step takes; none for others

Floats = NDArray[np.float32]
Offsets = NDArray[np.int64]


def up(number: int, step: int) -> int:
    """The next multiple of ``step``."""
    return -(-number // step) * step


class Step(NamedTuple):
    """A step of an epilogue, with the rows ``(channels,)`` that it takes."""

    code: int
    rows: tuple[Floats, ...] = ()


@dataclass(eq=False)
class Map:
    """Floats ``(channels, height, width)``, the channels of a pixel side by side; ``source`` computes them."""

    channels: int
    height: int
    width: int
    source: "Operation | None" = None  # None: the image

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(channels, height, width)``"""
        return self.channels, self.height, self.width

    @property
    def pitch(self) -> int:
        """Floats from one pixel to the next."""
        return up(self.channels, LANES)

    @property
    def pixels(self) -> int:
        """Height times width."""
        return self.height * self.width


@dataclass(eq=False)
class Signs:
    """+1 where ``low <= map <= high``; ``thresholds`` are ``(2, channels)``."""

    map: Map
    thresholds: Floats


@dataclass(eq=False)
class Operation:
    """Computes ``result``, a map, from ``x``. Steps of the epilogue may take ``residual``, a map of the same size or,
    if it has one pixel, that pixel everywhere."""

    x: Map | Signs
    result: Map = field(init=False)
    steps: list[Step] = field(default_factory=list)
    residual: Map | None = None
    signs: Signs | None = None  # of the result, if they are computed in the same pass
    wants_floats: bool = True  # whether the result itself is read

    @property
    def has_epilogue(self) -> bool:
        """Whether it can do steps and signs."""
        return True

    @property
    def reads(self) -> list[Map]:
        """The maps whose floats, or whose signs, it reads."""
        x = self.x.map if isinstance(self.x, Signs) else self.x
        return [x] if self.residual is None else [x, self.residual]


@dataclass(eq=False)
class Pointwise(Operation):
    """The epilogue alone."""


@dataclass(eq=False)
class Pool(Operation):
    """Maxima or means of windows. ``rows`` and ``columns`` ``(n, 3)``: first, last + 1 and divisor of each."""

    rows: NDArray[np.int32] = field(kw_only=True)
    columns: NDArray[np.int32] = field(kw_only=True)
    dilation: tuple[int, int] = (1, 1)
    is_mean: bool = field(kw_only=True)


@dataclass(eq=False)
class Convolution(Operation):
    """A convolution with ``weight`` ``(O, I / groups, kh, kw)``: floats, or for signs bools, true for +1.

    ``padding`` is (top, bottom, left, right), with zeros.
    """

    weight: NDArray[Any] = field(kw_only=True)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def is_depthwise(self) -> bool:
        """Whether each channel of floats has one filter of its own."""
        return isinstance(self.x, Map) and self.groups == len(self.weight) == self.x.channels > 1

    @property
    def has_epilogue(self) -> bool:
        """Not where its groups do not begin at whole vectors."""
        return self.groups == 1 or self.is_depthwise or len(self.weight) // self.groups % LANES == 0


@dataclass(eq=False)
class Normalize(Operation):
    """Each pixel's channels minus their mean, by their standard deviation; or their softmax, if ``eps`` is None."""

    eps: float | None = None


@dataclass(eq=False)
class Product(Operation):
    """Products of matrices: channel j of pixel i in row b is the sum over k of
    ``x[first[b] + rows[i] + depth[k]] other[second[b] + across[k] + j]``, with places in floats from a map's begin.
    """

    other: Map = field(kw_only=True)
    first: Offsets = field(kw_only=True)
    rows: Offsets = field(kw_only=True)
    depth: Offsets = field(kw_only=True)
    second: Offsets = field(kw_only=True)
    across: Offsets = field(kw_only=True)

    @property
    def reads(self) -> list[Map]:
        """As of every operation, and the other factor."""
        return [*super().reads, self.other]


class Part(NamedTuple):
    """Numbers of a map, or constants, and where they go: element (i, j, ...) from ``x[0][i] + x[1][j] + ...`` to
    ``y[0][i] + y[1][j] + ...``."""

    source: Map | Floats
    x: Sequence[Offsets]
    y: Sequence[Offsets]


@dataclass(eq=False)
class Arrange(Operation):
    """A map put together from parts of others; ``x`` is the first of them, or of no meaning if there are none."""

    parts: list[Part] = field(kw_only=True)

    @property
    def has_epilogue(self) -> bool:
        """No."""
        return False

    @property
    def reads(self) -> list[Map]:
        """The maps among the parts' sources."""
        return [part.source for part in self.parts if isinstance(part.source, Map)]


def convolved_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """The length of a side after a convolution; ``padding`` is that of both ends."""
    return (size + padding - dilation * (kernel - 1) - 1) // stride + 1
