"""Planned: a packed network in the C runtime of ``plugins/bonn-qat-runtime``, where that is installed and takes it."""

import functools
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from bonn_qat.modes import flushes_denormals
from bonn_qat.runtime.dry_run import MEMORY


class Planned:
    """The network of a ``dump()`` in C, for tensors in one state; its ``network`` is None for a ``reason``.

    The C runtime has the weights a second time, laid out for this CPU.
    """

    def __init__(self, tensors: Mapping[str, Tensor], dump: Callable[[], bytes]) -> None:
        self.network: Any = None
        self.reason = ""
        self._tensors = tuple(tensors.values())
        self._counts = not any(tensor.is_inference() for tensor in self._tensors)
        self._state = _state(self._tensors) if self._counts else []
        runtime = _package()
        if runtime is None:
            self.reason = "bonn-qat-runtime is not installed (in a clone: pip install ./plugins/bonn-qat-runtime)"
        elif not self._counts:
            self.reason = "its tensors were made in torch.inference_mode, and so do not tell when they change"
        else:
            try:
                network = runtime.Network(dump())
                if network.arena_bytes <= MEMORY:
                    self.network = network
                else:
                    self.reason = f"its plan needs {network.arena_bytes:,} bytes for an image"
            except MemoryError:
                self.reason = "its plan does not fit into memory"
            except runtime.RuntimeFailure as error:
                self.reason = str(error).removeprefix("the bytes: ").partition("; use bonn_qat.PackedModel")[0]

    def run(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The network's outputs, a tuple of several, computed by as many threads as torch has."""
        self.network.threads = torch.get_num_threads()
        is_flushed = flushes_denormals()
        if is_flushed:
            torch.set_flush_denormal(False)
        try:
            outputs = self.network(images.numpy(force=True))
        finally:
            if is_flushed:
                torch.set_flush_denormal(True)
        return tuple(map(torch.from_numpy, outputs)) if isinstance(outputs, tuple) else torch.from_numpy(outputs)

    def is_of(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether ``tensors`` are those that it was made of, and have not changed since."""
        found = tensors.values()
        if len(found) != len(self._tensors) or not all(map(operator.is_, found, self._tensors)):
            return False
        return not self._counts or _state(found) == self._state


def takes(images: Tensor) -> bool:
    """Whether ``images`` are an ordinary tensor on a CPU, and no mode watches torch's operations."""
    if type(images) is not Tensor or images.device.type != "cpu":
        return False
    return not (torch._C._len_torch_dispatch_stack() or torch._C._functorch.is_functorch_wrapped_tensor(images))


def _state(tensors: Iterable[Tensor]) -> list[tuple[int, int]]:
    """Where tensors lie, and torch's count of their changes."""
    return [(tensor.data_ptr(), tensor._version) for tensor in tensors]


@functools.cache
def _package() -> Any:
    try:
        import bonn_qat_runtime
    except ImportError:
        return None
    return bonn_qat_runtime
