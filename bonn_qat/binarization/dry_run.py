"""dry_run: model, size -> DryRun, what each layer meets in one forward pass, found without computing anything.

The pass runs on a copy whose tensors have shapes but no memory, so that a model of any size, on any device, costs the
time of its Python code alone.
"""

import contextlib
import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

_BATCH = 2


@dataclass(frozen=True, kw_only=True)
class Use:
    """One layer's first call: its place among all calls, and the shapes that went in and out.

    ``sees_image`` is false where the input does not follow from the image, as a table of positions.
    """

    order: int
    input: torch.Size
    output: torch.Size
    sees_image: bool


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """``uses`` are the layers that were called, by name; ``readers`` name who else read a layer's weight."""

    uses: Mapping[str, Use]
    readers: Mapping[str, str]


def dry_run(model: nn.Module, layers: Iterable[str], input_size: Sequence[int]) -> DryRun:
    """Follow two images of ``input_size`` ``(C, H, W)`` through ``model`` in evaluation mode, watching ``layers``.

    The model is not touched. Raises whatever the model raises.
    """
    layers = list(layers)
    try:
        with torch.device("meta"):
            return _follow(model, layers, input_size, "meta")
    except Exception:
        # Meta tensors are quick, but do not mix with a model's tensors that are no buffers; fake ones do.
        with _silence(), FakeTensorMode(allow_non_fake_inputs=True):
            return _follow(model, layers, input_size, "cpu")


def _follow(model: nn.Module, layers: list[str], input_size: Sequence[int], device: str) -> DryRun:
    ghost = _ghost(model, device).eval()
    reference = next((p for p in ghost.parameters() if p.is_floating_point()), torch.empty(0))
    image = torch.empty(_BATCH, *input_size, dtype=reference.dtype, device=device).requires_grad_()
    watch = _Watch(ghost, layers)
    with torch.enable_grad(), watch:
        ghost(image * 1)  # not a leaf, which no layer may change in place
    return DryRun(uses=watch.uses, readers=watch.readers)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    # torch logs a traceback of its own for a size that does not fit; the caller gets the exception.
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _ghost(model: nn.Module, device: str) -> nn.Module:
    """A copy whose tensors have no memory."""
    # Without gradients, so that whether a tensor has one tells whether it comes from the image.
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device=device)
    return copy.deepcopy(model, memo)


class _Watch(TorchFunctionMode):
    """Notes the calls of the watched layers, and every operation on the weight of one that is not running."""

    def __init__(self, model: nn.Module, layers: Iterable[str]) -> None:
        super().__init__()
        self.uses: dict[str, Use] = {}
        self.readers: dict[str, str] = {}
        watched = {name: model.get_submodule(name) for name in layers}
        self._owners = {id(getattr(layer, "weight", None)): name for name, layer in watched.items()}
        self._running: list[str] = []
        for name, module in model.named_modules():
            module.register_forward_pre_hook(self._entered(name))
            module.register_forward_hook(self._left(name, name in watched), with_kwargs=True)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        results = result if isinstance(result, tuple | list) else (result,)
        if any(isinstance(x, Tensor) for x in results):  # not what only asks for a shape, a type or a device
            for tensor in (*args, *(kwargs or {}).values()):
                owner = self._owners.get(id(tensor)) if isinstance(tensor, Tensor) else None
                if owner is not None and owner not in self._running:
                    self.readers.setdefault(owner, self._running[-1] if self._running else "")
        return result

    def _entered(self, name: str) -> Callable[..., None]:
        return lambda *_: self._running.append(name)

    def _left(self, name: str, watched: bool) -> Callable[..., None]:
        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self._running.pop()
            source = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
            if watched and name not in self.uses and source is not None and isinstance(output, Tensor):
                self.uses[name] = Use(
                    order=len(self.uses), input=source.shape, output=output.shape, sees_image=source.requires_grad
                )

        return note
