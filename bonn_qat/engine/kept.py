"""What autograd keeps of a forward pass: not what is cheap to compute again.

Besides its input each module keeps what its own backward pass needs: a norm the output of the binary layer before it,
an attention its queries. With :func:`lean` on a model, such a tensor is kept as a note of where it came from, and
computed again, bit for bit, when the backward pass asks for it: a binary product from the signs as bits, an activation
function or a batch norm from its input, which may be such a note in turn.
"""

import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from bonn_qat.engine.functions import affine, affine_map

_ACTIVE = threading.local()
# By the name of autograd's node: the operation on the input that the node has kept.
_POINTWISE: Mapping[str, Callable[[Any], Tensor]] = {
    "GeluBackward0": lambda node: nn.functional.gelu(node._saved_self, approximate=node._saved_approximate),
    "SiluBackward0": lambda node: nn.functional.silu(node._saved_self),
    "HardswishBackward0": lambda node: nn.functional.hardswish(node._saved_self),
}


class _Again(NamedTuple):
    """An output of ``node`` that ``compute(node)`` gives again, or a view of it with this size, stride and offset.

    A function of ours says how in ``ctx.again``. If it has a ``ctx.made``, the output stays there, for others that ask
    for it, until the backward pass of the function.
    """

    node: Any
    compute: Callable[[Any], Tensor]
    view: tuple[Any, ...] | None

    def tensor(self) -> Tensor:
        """The output or its view."""
        made: Tensor | None = getattr(self.node, "made", None)
        if made is None:
            with torch.no_grad():
                made = self.compute(self.node)
            if hasattr(self.node, "made"):
                self.node.made = made
        return made if self.view is None else made.as_strided(*self.view)


class _Kept(NamedTuple):
    tensor: Tensor
    version: int


def _computation(tensor: Tensor, node: Any) -> Callable[[Any], Tensor] | None:
    """How an output of ``node`` is computed again; None if it is not."""
    if node is None:
        return None
    again: Callable[[Any], Tensor] | None = getattr(node, "again", None)
    if again is not None:
        return again if hasattr(node, "made") or _is_ours(node._raw_saved_tensors[0]) else None
    name = node.name()
    if not (name == "NativeBatchNormBackward0" or name in _POINTWISE):
        return None
    if not _is_ours(node._raw_saved_input if name == "NativeBatchNormBackward0" else node._raw_saved_self):
        return None
    if name == "NativeBatchNormBackward0" and tensor.dtype == torch.float32 and tensor.device.type == "cpu":
        # Weight and bias are leaves, and the statistics those of the batch.
        is_plain = node._saved_training and all(hasattr(edge[0], "variable") for edge in node.next_functions[1:3])
        return _normed if is_plain else None
    return _POINTWISE.get(name)


def _is_ours(saved: Any) -> bool:
    """Whether :func:`_pack` has kept a node's tensor. Others may have: torch's checkpointing gives it only once."""
    return isinstance(saved.data, _Kept | _Again)


def _normed(node: Any) -> Tensor:
    weight, bias = (edge[0].variable for edge in node.next_functions[1:3])
    return affine_map(node._saved_input, *affine(weight, bias, node._saved_result1, node._saved_result2))


def _pack(tensor: Tensor) -> "_Again | _Kept | Tensor":
    if tensor.is_inference():
        return tensor
    base = tensor._base if tensor._is_view() else None
    source = tensor if base is None else base
    compute = None if tensor._version else _computation(source, source.grad_fn)
    if compute is None:
        return _Kept(tensor, tensor._version)
    view = None if base is None else (tensor.shape, tensor.stride(), tensor.storage_offset())
    return _Again(source.grad_fn, compute, view)


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


def _enter(module: nn.Module, inputs: Any) -> None:
    is_traced = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    active = torch.is_grad_enabled() and not is_traced
    hooks = saved_tensors_hooks(_pack, _unpack) if active else None
    if hooks is not None:
        hooks.__enter__()
    vars(_ACTIVE).setdefault("stack", []).append(hooks)


def _leave(module: nn.Module, inputs: Any, output: Any) -> None:
    hooks = _ACTIVE.stack.pop()
    if hooks is not None:
        hooks.__exit__()


def lean(model: nn.Module) -> None:
    """Keep less for the backward pass in each call of ``model``; see above."""
    model.register_forward_pre_hook(_enter, prepend=True)
    model.register_forward_hook(_leave, always_call=True)
