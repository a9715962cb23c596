"""Operations: a network between the file and the plan, one object for each pass over a map.

A map has the shape ``(channels, height, width)``, for one image. Every operation but the first and the last ends with
an *epilogue*, a list of steps, and may give the signs of its result.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

SCALE, ADD, FMA, RESIDUAL, PRELU, CLAMP = range(6)
ROWS = {SCALE: 1, ADD: 1, FMA: 2, RESIDUAL: 0, PRELU: 1, CLAMP: 2}

Floats = NDArray[np.float32]


class Step(NamedTuple):
    """A step of an epilogue, with the rows ``(channels,)`` that it takes."""

    code: int
    rows: tuple[Floats, ...] = ()


@dataclass(eq=False)
class Map:
    """Floats ``(channels, height, width)``; ``is_flat``: torch has them as one axis. ``source`` computes them."""

    channels: int
    height: int
    width: int
    source: "Operation | None" = None  # None: the image
    is_flat: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(channels, height, width)``"""
        return self.channels, self.height, self.width


@dataclass(eq=False)
class Signs:
    """+1 where ``low <= map <= high``; ``thresholds`` are ``(2, channels)``."""

    map: Map
    thresholds: Floats


@dataclass(eq=False)
class Operation:
    """Computes ``result``, a map, from ``x``. The epilogue adds ``residual`` where it has such a step."""

    x: Map | Signs
    result: Map = field(init=False)
    steps: list[Step] = field(default_factory=list)
    residual: Map | None = None
    signs: Signs | None = None  # of the result, if they are computed in the same pass
    wants_floats: bool = True  # whether the result itself is read


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
    def is_ragged(self) -> bool:
        """Whether its groups do not begin at whole vectors, so that it can have no epilogue."""
        return self.groups > 1 and not self.is_depthwise and len(self.weight) // self.groups % 16 != 0


def convolved_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """The length of a side after a convolution; ``padding`` is that of both ends."""
    return (size + padding - dilation * (kernel - 1) - 1) // stride + 1
