"""Guesses: sizes and numbers that depend on data, in a pass where tensors hold none.

Detectors select boxes by their scores. Such a selection is taken to keep everything, which leaves the flow of data from
layer to layer as it is.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

_MOST = 10_000  # a loop that waits for a number would never end


class Guesses:
    """Calls operators, and answers for those that fake tensors cannot answer."""

    def __init__(self) -> None:
        self._made = 0

    def call(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The result of ``func``, guessed if it depends on data. Raises what ``func`` raises if there is no guess."""
        try:
            return func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            guess = _GUESSES.get(func.overloadpacket.__name__)
            self._made += 1
            if guess is None or self._made > _MOST:
                raise
            return guess(func, *args, **kwargs)


def _number(func: Any, x: Tensor) -> Any:
    return False if x.dtype == torch.bool else 1.0 if x.is_floating_point() else 1


def _equal(func: Any, x: Tensor, other: Tensor) -> bool:
    return x.shape == other.shape


def _nonzero(func: Any, x: Tensor) -> Tensor:
    return x.new_zeros(x.numel(), x.ndim, dtype=torch.long)


def _masked_select(func: Any, x: Tensor, mask: Tensor) -> Tensor:
    return x.new_empty(math.prod(torch.broadcast_shapes(x.shape, mask.shape)))  # type: ignore[no-untyped-call]


def _index(func: Any, x: Tensor, indices: list[Tensor | None], *values: Any, **kwargs: Any) -> Any:
    whole: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype in (torch.bool, torch.uint8):
            whole += index.new_zeros(index.ndim, index.numel(), dtype=torch.long).unbind()
        else:
            whole.append(index)
    return func(x, whole, *values, **kwargs)


def _nms(func: Any, boxes: Tensor, *_: Any, **__: Any) -> Tensor:
    return boxes.new_zeros(len(boxes), dtype=torch.long)


def _unique(func: Any, x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
    # One value, because code loops over them.
    return x.new_empty(1), x.new_zeros(x.shape, dtype=torch.long), x.new_zeros(1, dtype=torch.long)


def _repeat_interleave(func: Any, repeats: Tensor, **_: Any) -> Tensor:
    return repeats.new_zeros(len(repeats), dtype=torch.long)


_GUESSES: Mapping[str, Callable[..., Any]] = {
    "_local_scalar_dense": _number,
    "equal": _equal,
    "nonzero": _nonzero,
    "masked_select": _masked_select,
    "index": _index,
    "index_put": _index,
    "index_put_": _index,
    "nms": _nms,
    "_unique2": _unique,
    "unique_consecutive": _unique,
    "repeat_interleave": _repeat_interleave,
}
