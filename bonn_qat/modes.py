"""Modes for a block: of modules, training or evaluation; of torch itself, what a caller may have set around us."""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn


def _never(module: nn.Module) -> bool:
    return False


@contextlib.contextmanager
def modes(model: nn.Module, training: Callable[[nn.Module], bool] = _never) -> Iterator[None]:
    """Within the block, only modules for which ``training(module)`` is true are in training mode; by default none.

    Afterwards every module has its previous flag, so a norm that the user froze stays frozen.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2).eval())
    >>> with modes(model):
    ...     print(model[0].training, model[1].training)
    False False
    >>> print(model[0].training, model[1].training)
    True False
    """
    before = {module: module.training for module in model.modules()}
    for module in before:
        module.training = training(module)
    try:
        yield
    finally:
        for module, flag in before.items():
            module.training = flag


def flushes_denormals() -> bool:
    """Whether the calling thread makes 0 of denormal numbers, as ``torch.set_flush_denormal(True)`` has it."""
    return sys.float_info.min * _HALF == 0


def neutral(*, making: bool = False) -> contextlib.AbstractContextManager[None]:
    """Within the block torch computes as in a fresh process, without gradients, whatever the caller has set.

    That is: neither ``torch.autocast`` nor ``torch.inference_mode``, no flushing of denormal numbers, and float32
    products in full precision. With ``making``, for what makes tensors and is not called often, also the default type
    and device, no deterministic mode and no anomaly mode; the default type and the deterministic mode are those of the
    whole process, so other threads should not compute meanwhile.

    >>> with torch.autocast("cpu"), neutral():
    ...     print((torch.ones(1, 1) @ torch.ones(1, 1)).dtype)
    torch.float32
    """
    return _Neutral(making)


class _Neutral(contextlib.AbstractContextManager[None]):
    """As :func:`neutral`; what is as it should be costs a look at it, because a packed network enters for each call."""

    def __init__(self, making: bool) -> None:
        self.making = making
        self.undo: contextlib.ExitStack | None = None

    def __enter__(self) -> None:
        self.grad = torch.is_grad_enabled()
        is_other = (
            self.making or torch.is_inference_mode_enabled() or flushes_denormals()
            or any(map(torch.is_autocast_enabled, _AUTOCAST))
        )  # fmt: skip
        if is_other:
            self.undo = contextlib.ExitStack()
            _enter(self.undo, self.making)
        torch._C._set_grad_enabled(False)
        _EXACT.enter()

    def __exit__(self, *error: object) -> None:
        _EXACT.leave()
        if self.undo is not None:
            self.undo.close()
        torch._C._set_grad_enabled(self.grad)


_AUTOCAST = ("cpu", "cuda")
_HALF = 0.5  # of the least normal number is a denormal one


def _enter(stack: contextlib.ExitStack, making: bool) -> None:
    if torch.is_inference_mode_enabled():
        stack.enter_context(torch.inference_mode(False))
    for kind in _AUTOCAST:
        if torch.is_autocast_enabled(kind):
            stack.enter_context(torch.autocast(kind, enabled=False))
    if flushes_denormals():
        torch.set_flush_denormal(False)
        stack.callback(torch.set_flush_denormal, True)
    if not making:
        return
    if (dtype := torch.get_default_dtype()) != torch.float32:
        torch.set_default_dtype(torch.float32)
        stack.callback(torch.set_default_dtype, dtype)
    if torch.get_default_device().type != "cpu":
        stack.enter_context(torch.device("cpu"))
    if torch.are_deterministic_algorithms_enabled():
        warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
        torch.use_deterministic_algorithms(False)
        stack.callback(torch.use_deterministic_algorithms, True, warn_only=warn_only)
    if torch.is_anomaly_enabled():
        stack.enter_context(torch.autograd.set_detect_anomaly(False, torch.is_anomaly_check_nan_enabled()))


class _Exact:
    """Full precision of float32 products, which is set for the whole process, for as long as a thread is within."""

    def __init__(self) -> None:
        self.lock, self.inside = threading.Lock(), 0
        self.before: list[tuple[Any, str]] = []

    def enter(self) -> None:
        with self.lock:
            if not self.inside:
                backend: Any = torch.backends.mkldnn
                given = [(part, part.fp32_precision) for part in (backend.matmul, backend.conv)]
                self.before = [(part, value) for part, value in given if value not in ("ieee", "none")]
                for part, _ in self.before:
                    part.fp32_precision = "ieee"
            self.inside += 1

    def leave(self) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                for part, value in self.before:
                    part.fp32_precision = value


_EXACT = _Exact()
