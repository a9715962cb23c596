"""Copies of a model: the whole of it, or a ghost whose tensors have shapes but no memory."""

import copy
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

from bonn_qat.errors import InvalidModel, is_out_of_memory
from bonn_qat.files.plain import one_line


class CannotBeCopied(InvalidModel):
    """A model that keeps something that copy.deepcopy refuses."""


_LOCKS = {type(make()): make for make in (threading.Lock, threading.RLock)}


def unwrapped(model: nn.Module) -> nn.Module:
    """The model within ``torch.compile``, ``DataParallel`` and ``DistributedDataParallel``, which share its weights.

    >>> net = nn.Linear(2, 2)
    >>> unwrapped(nn.DataParallel(torch.compile(net))) is net
    True
    """
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def copied(model: nn.Module, remedy: str = "") -> nn.Module:
    """A deep copy of ``model``. Of a tensor that an earlier pass computed it holds the values, without their history.

    Raises CannotBeCopied, which names what cannot be copied, such as an open file, and also tells the ``remedy``.

    >>> net = nn.Linear(2, 2)
    >>> net.last = net(torch.ones(1, 2))
    >>> copied(net).last.requires_grad
    False
    """
    return _copy(model, {}, lambda culprit: make() if (make := _LOCKS.get(type(culprit))) else None, remedy)


def ghost(model: nn.Module, fake: FakeTensorMode | None) -> nn.Module:
    """A copy of ``model`` whose parameters and buffers have no memory: meta tensors, or ``fake`` ones of the CPU.

    It shares with the model what cannot be copied. Raises CannotBeCopied for a module that refuses to be copied.
    """

    def empty(tensor: Tensor) -> Tensor:
        found = torch.empty_like(tensor, device="meta")
        return FakeTensor(fake, found, torch.device("cpu")) if fake else found

    known: dict[int, Any] = {id(buffer): empty(buffer) for buffer in model.buffers()}
    for parameter in model.parameters():
        known[id(parameter)] = nn.Parameter(empty(parameter), requires_grad=parameter.requires_grad)
    return _copy(model, known, lambda culprit: None if isinstance(culprit, nn.Module | Tensor) else culprit)


def _copy(model: nn.Module, known: dict[int, Any], stand_in: Callable[[Any], Any], remedy: str = "") -> nn.Module:
    """A deep copy with ``stand_in(x)`` for each x that refuses to be copied; None refuses for good.

    ``known`` holds copies that are made already, by the id of the original.
    """
    while True:
        try:
            with _Detached():
                return copy.deepcopy(model, dict(known))
        except Exception as error:
            if is_out_of_memory(error):
                raise
            chain = _refused(error.__traceback__)
            new = stand_in(chain[-1]) if chain and id(chain[-1]) not in known else None
            if new is None:
                raise _refusal(model, chain, error, remedy) from error
            known[id(chain[-1])] = new


class _Detached(TorchFunctionMode):
    """Tensors that autograd computed can be copied too."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            return memo.setdefault(id(tensor), tensor.detach().clone())
        return func(*args, **(kwargs or {}))


def _refused(trace: TracebackType | None) -> list[Any]:
    """The objects that copy.deepcopy was in, from the model to the one at which it stopped."""
    found = []
    while trace is not None:
        if trace.tb_frame.f_code is copy.deepcopy.__code__:
            found.append(trace.tb_frame.f_locals["x"])
        trace = trace.tb_next
    return found


def _refusal(model: nn.Module, chain: list[Any], error: Exception, remedy: str) -> CannotBeCopied:
    owners = [i for i, x in enumerate(chain) if isinstance(x, nn.Module)]
    place = type(model).__name__
    if owners:
        owner, within = chain[owners[-1]], chain[owners[-1] + 1 :]
        name = next((name for name, module in model.named_modules() if module is owner), "")
        key = next((key for key, value in vars(owner).items() if any(value is x for x in within)), "")
        place = ".".join(filter(None, (name, key))) or f"{type(owner).__name__} itself"
    return CannotBeCopied(
        f"{type(model).__name__} cannot be copied because of {place}: {one_line(error)}; remove it first{remedy}"
    )
