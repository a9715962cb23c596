"""What autograd keeps of a forward pass: not what is cheap to compute again.

Besides its input each module keeps what its own backward pass needs: a norm the output of the binary layer before it,
an attention its queries. With :func:`lean` on a model, such a tensor is kept as a note of where it came from, and
computed again, bit for bit, when the backward pass asks for it: a binary product from the signs as bits, an activation
function or a batch norm from its input, which may be such a note in turn.
"""

import functools
import sys
import threading
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from bonn_qat.engine.functions import affine, affine_map

_ACTIVE = threading.local()
_autograd: Any = torch._C._autograd
# By the name of autograd's node: the operation on the input that the node has kept.
_POINTWISE: Mapping[str, Callable[[Any], Tensor]] = {
    "GeluBackward0": lambda node: nn.functional.gelu(node._saved_self, approximate=node._saved_approximate),
    "SiluBackward0": lambda node: nn.functional.silu(node._saved_self),
    "HardswishBackward0": lambda node: nn.functional.hardswish(node._saved_self),
}


class _Again(NamedTuple):
    """An output of ``node`` that ``compute(node)`` gives again, or a view of it with ``size`` and ``offset``.

    A function of ours says how in ``ctx.again``. If it has a ``ctx.made``, the output stays there, for others that ask
    for it, until the backward pass of the function.
    """

    node: Any
    compute: Callable[[Any], Tensor]
    is_view: bool
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def tensor(self) -> Tensor:
        """The output or its view."""
        made: Tensor | None = getattr(self.node, "made", None)
        if made is None:
            with torch.no_grad():
                made = self.compute(self.node)
            if hasattr(self.node, "made"):
                self.node.made = made
        return made.as_strided(self.size, self.stride, self.offset) if self.is_view else made


class _Kept(NamedTuple):
    tensor: Tensor
    version: int

    @property
    def stride(self) -> tuple[int, ...]:
        return self.tensor.stride()


def _computation(tensor: Tensor, node: Any) -> Callable[[Any], Tensor] | None:
    """How an output of ``node`` is computed again; None if it is not."""
    if node is None:
        return None
    again: Callable[[Any], Tensor] | None = getattr(node, "again", None)
    if again is not None:
        return again if hasattr(node, "made") or _ours(node._raw_saved_tensors[0]) else None
    name = node.name()
    if name in _POINTWISE:
        return _POINTWISE[name] if _ours(node._raw_saved_self) else None
    if name != "NativeBatchNormBackward0" or tensor.dtype != torch.float32 or tensor.device.type != "cpu":
        return None
    kept = _ours(node._raw_saved_input)
    # Of an input with gaps or another order torch's norm rounds in another way, and its output has another layout.
    if kept is None or kept.stride != tensor.stride():
        return None
    # Weight and bias are leaves, and the statistics those of the batch.
    if not (node._saved_training and all(hasattr(edge[0], "variable") for edge in node.next_functions[1:3])):
        return None
    weight, bias = (edge[0].variable for edge in node.next_functions[1:3])
    with torch.no_grad():  # now, because an optimizer may change weight and bias before the backward pass
        constants = affine(weight, bias, node._saved_result1, node._saved_result2)
    return functools.partial(_normed, constants)


def _ours(saved: Any) -> "_Kept | _Again | None":
    """What :func:`_pack` has kept of a node's tensor; None if others have, as a checkpoint does that gives it once."""
    return saved.data if isinstance(saved.data, _Kept | _Again) else None


def _normed(constants: tuple[Tensor, Tensor], node: Any) -> Tensor:
    return affine_map(node._saved_input, *constants)


def _pack(tensor: Tensor) -> "_Again | _Kept | Tensor":
    if tensor.is_inference():
        return tensor
    base = tensor._base if tensor._is_view() else None
    source = tensor if base is None else base
    compute = None if tensor._version else _computation(source, source.grad_fn)
    if compute is None:
        return _Kept(tensor, tensor._version)
    return _Again(
        source.grad_fn, compute, base is not None, tensor.shape, tensor.stride(), cast(int, tensor.storage_offset())
    )


def _unpack(kept: "_Again | _Kept | Tensor") -> Tensor:
    if isinstance(kept, _Again):
        return kept.tensor()
    if isinstance(kept, _Kept):
        # Autograd does not check what hooks have kept.
        if kept.tensor._version != kept.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"{kept.tensor.dtype} {tuple(kept.tensor.shape)} is at version {kept.tensor._version}; "
                f"expected version {kept.version} instead"
            )
        return kept.tensor
    return kept


class _Call(NamedTuple):
    """A call of a lean model; ``frame`` is that of torch's function that calls its hooks."""

    hooks: saved_tensors_hooks
    frame: FrameType


def _calls() -> list[_Call]:
    calls: list[_Call] = vars(_ACTIVE).setdefault("calls", [])
    return calls


def _enter(module: nn.Module, inputs: Any) -> None:
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None or not torch.is_grad_enabled():
        return
    caller = sys._getframe(1)
    _end(caller)  # calls that an interrupt has ended, after which torch runs no hook
    # Hooks that are there already, such as those of save_on_cpu or of a checkpoint, are to see all that is kept.
    if _autograd._top_saved_tensors_default_hooks(False) is None and _autograd._saved_tensors_hooks_is_enabled():
        hooks = saved_tensors_hooks(_pack, _unpack)
        hooks.__enter__()
        _calls().append(_Call(hooks, caller))


def _leave(module: nn.Module, inputs: Any, output: Any) -> None:
    if _calls():
        _end(sys._getframe(1))


def _end(caller: FrameType) -> None:
    """End the calls that do not go on: all but those above ``caller`` on Python's stack."""
    calls = _calls()
    above, frame = set(), caller.f_back
    while calls and frame is not None:
        above.add(frame)
        frame = frame.f_back
    while calls and calls[-1].frame not in above:
        hooks = calls.pop().hooks
        top = _autograd._top_saved_tensors_default_hooks(False)
        if top is not None and top[0] is _pack:
            hooks.__exit__()


def lean(model: nn.Module) -> None:
    """Keep less for the backward pass in each call of ``model``; see above."""
    model.register_forward_pre_hook(_enter, prepend=True)
    model.register_forward_hook(_leave, always_call=True)
