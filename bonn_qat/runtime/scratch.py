"""Scratch: bytes that an operator needs while it runs, in addition to its arguments and its results.

Torch does not say them, so they are declared here, by the groups of :mod:`~bonn_qat.runtime.allowed`, as upper bounds.
``tests/runtime/test_memory.py`` measures every operator.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bonn_qat.runtime import allowed


def scratch(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> int:
    """Bytes for one call; tensors need no memory (``meta``)."""
    name = str(function)
    if name.startswith("bonn_qat."):
        return _of_ours(name, allowed.bound(function, args, kwargs), result)
    taken, made = allowed.tensors([*args, kwargs]), allowed.tensors(result)
    group = allowed.GROUP_OF.get(name, "")
    if group in ("", "sizes", "views", "made"):
        return 0
    if name == "aten.index.Tensor":
        places = [tensor.shape for tensor in allowed.tensors(args[1])]
        return _copies(taken, made) + 8 * len(places) * math.prod(torch.broadcast_shapes(*places))  # type: ignore[no-untyped-call]
    if group in ("elementwise", "copies") and len({tensor.dtype for tensor in taken}) == 1:
        return 0
    special = _SPECIAL.get(group)
    return _copies(taken, made) + (special(made, **allowed.bound(function, args, kwargs)) if special else 0)


def _bytes(found: Sequence[Tensor], width: int = 0) -> int:
    return sum(tensor.numel() * max(width, tensor.element_size()) for tensor in found)


def _copies(taken: Sequence[Tensor], made: Sequence[Tensor]) -> int:
    """A copy of each argument, of the widest type and in another layout, and one of each result."""
    width = max((tensor.element_size() for tensor in (*taken, *made)), default=0)
    return _bytes(taken, width) + _bytes(made)


def _of_convolution(
    made: Sequence[Tensor], *, input: Tensor, weight: Tensor, transposed: bool = False, **rest: Any
) -> int:
    """The windows of all pixels side by side, where torch multiplies matrices, or channels in blocks of 16."""
    pixels = (input if transposed else made[0])[0, 0].numel() if len(input) else 0
    windows = 4 * pixels * weight[0].numel() * (1 if transposed else rest["groups"])
    blocked = 4 * 16 * (sum(tensor[:, 0].numel() for tensor in (input, *made)) + weight[:1, :1].numel())
    onednn = torch.backends.mkldnn
    has_onednn = bool(onednn.is_available() and onednn.enabled)  # type: ignore[no-untyped-call]
    has_blocks = has_onednn and input.numel() > 2**16 and not transposed
    return blocked + (0 if has_blocks else windows * len(input))


def _of_attention(made: Sequence[Tensor], *, query: Tensor, key: Tensor, value: Tensor, **rest: Any) -> int:
    """The scores, where torch computes them as a whole: with a mask, and softmax and product beside them.

    Keys and values that heads share are repeated for each.
    """
    scores = query[..., 0].numel() * key.shape[-2]
    repeated = sum(
        query[..., 0, 0].numel() * t[(0,) * (t.ndim - 2)].numel()
        for t in (key, value)
        if t.shape[:-2] != query.shape[:-2]
    )
    return (3 * scores + repeated) * query.element_size()


def _of_ours(name: str, given: Mapping[str, Any], result: Any) -> int:
    taken, made = allowed.tensors(dict(given)), allowed.tensors(result)
    if name.startswith("bonn_qat.unpack_signs"):
        return 3 * _bytes(made)
    signs = 32 * sum(tensor.numel() for tensor in (*taken, *made) if tensor.dtype == torch.int32)
    # In plain torch a bit becomes a word of its own on its way from and to words, and a float; an epilogue makes a map
    # in each step, while it holds the one before.
    return _copies(taken, made) + 24 * signs + 16 * sum(tensor.numel() for tensor in made if tensor.is_floating_point())


_SPECIAL: Mapping[str, Callable[..., int]] = {"convolutions": _of_convolution, "attention": _of_attention}
