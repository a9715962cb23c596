"""Views: tensors of torch as places in maps, so that a change of axes alone moves nothing."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce

import numpy as np

from bonn_qat_runtime.operations import Map, Offsets


@dataclass(frozen=True, eq=False)
class View:
    """Element (i, j, ...) lies at ``axes[0][i] + axes[1][j] + ...``, in floats from the begin of ``map``.

    The first axis of most is that of the images: one. ``is_whole``: it has each number of the map exactly once.
    """

    map: Map
    axes: tuple[Offsets, ...]
    is_whole: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Torch's."""
        return tuple(map(len, self.axes))

    def axis(self, number: int) -> int:
        """An axis counted from the begin. Raises IndexError if there is none."""
        return range(len(self.axes))[number]

    def is_channel(self, axis: int) -> bool:
        """Whether all channels of a pixel lie along an axis, and nothing else does."""
        offsets = self.axes[axis]
        return self.is_whole and len(offsets) == self.map.channels and bool((offsets == np.arange(len(offsets))).all())

    def permuted(self, order: Sequence[int]) -> "View":
        """Raises ValueError for an order that has not each axis once."""
        places = [self.axis(number) for number in order]
        if sorted(places) != list(range(len(self.axes))):
            raise ValueError(f"the order {list(order)} of {len(self.axes)} axes")
        return replace(self, axes=tuple(self.axes[place] for place in places))

    def taken(self, axis: int, indices: slice | Offsets) -> "View":
        """Some places along an axis."""
        axis = self.axis(axis)
        new = self.axes[axis][indices]
        is_whole = self.is_whole and isinstance(indices, slice) and len(new) == len(self.axes[axis])
        return View(self.map, (*self.axes[:axis], new, *self.axes[axis + 1 :]), is_whole)

    def expanded(self, shape: Sequence[int]) -> "View":
        """Repeated along axes of length 1; further axes come first. Raises ValueError where that does not fit."""
        missing = len(shape) - len(self.axes)
        axes = [np.zeros(1, np.int64)] * missing + list(self.axes)
        if missing < 0 or any(len(a) not in (1, n) and n != -1 for a, n in zip(axes, shape, strict=True)):
            raise ValueError(f"a tensor {self.shape} as {tuple(shape)}")
        axes = [a.repeat(n) if len(a) == 1 and n > 0 else a for a, n in zip(axes, shape, strict=True)]
        return View(self.map, tuple(axes), self.is_whole and math.prod(map(len, axes)) == math.prod(self.shape))

    def reshaped(self, shape: Sequence[int]) -> "View | None":
        """The same elements with other axes; None where their places do not allow it."""
        old, new = [a for a in self.axes if len(a) > 1], [n for n in shape if n > 1]
        start = sum(int(a[0]) for a in self.axes if len(a) == 1)
        made = list[Offsets]()
        while old:
            merged, sizes = old.pop(0), [new.pop(0)]
            while len(merged) != math.prod(sizes):
                if len(merged) < math.prod(sizes):
                    merged = (merged[:, None] + old.pop(0)).reshape(-1)
                else:
                    sizes.append(new.pop(0))
            pieces = _split(merged, sizes)
            if pieces is None:
                return None
            made += pieces
        axes = [made.pop(0) if n > 1 else np.zeros(1, np.int64) for n in shape]
        if start:
            axes = [axes[0] + start, *axes[1:]] if axes else axes
        return View(self.map, tuple(axes), self.is_whole) if axes or not start else None

    def places(self) -> Offsets:
        """Where each element lies."""
        return reduce(np.add.outer, self.axes, np.zeros((), np.int64))


def _split(merged: Offsets, sizes: Sequence[int]) -> list[Offsets] | None:
    """One axis as several, if the places allow it."""
    if len(sizes) == 1:
        return [merged]
    grid = merged.reshape(sizes)
    axes = [grid[(0,) * k + (slice(None),) + (0,) * (len(sizes) - k - 1)] for k in range(len(sizes))]
    axes[1:] = [axis - axis[0] for axis in axes[1:]]
    return axes if np.array_equal(reduce(np.add.outer, axes), grid) else None


def laid(x: Map, shape: Sequence[int], channel: int = -1) -> View:
    """A tensor of this shape that is all of ``x``: one axis has the channels, the others count pixels."""
    channel = range(len(shape))[channel]
    axes, step = [np.arange(x.channels)] * len(shape), x.pitch
    for axis in reversed(range(len(shape))):
        if axis != channel:
            axes[axis] = np.arange(shape[axis]) * step
            step *= shape[axis]
    return View(x, tuple(axes), True)


def image(x: Map) -> View:
    """A map as torch has images: ``(1, C, H, W)``."""
    return laid(x, (1, *x.shape), 1)
