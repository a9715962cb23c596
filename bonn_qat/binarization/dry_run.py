"""dry_run: model, size -> DryRun, the shapes that each layer sees in one forward pass, without computing anything.

The pass runs on a copy whose tensors have shapes but no memory, so that a model of any size, on any device, takes only
the time of its Python code.
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
    """One layer's first call: its position among all calls, and the shapes of input and output.

    ``sees_image`` is false if the input does not depend on the image, such as a table of positions.
    """

    order: int
    input: torch.Size
    output: torch.Size
    sees_image: bool


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """``uses``: the layers that were called, by name. ``readers``: which other module read a layer's weight."""

    uses: Mapping[str, Use]
    readers: Mapping[str, str]


def dry_run(model: nn.Module, layers: Iterable[str], input_size: Sequence[int]) -> DryRun:
    """Pass two images of ``input_size`` ``(C, H, W)`` through ``model`` in evaluation mode and observe ``layers``.

    The model is not changed. Raises whatever the model raises.

    >>> dry_run(nn.Sequential(nn.Conv2d(3, 8, 3)), ["0"], (3, 32, 32)).uses["0"].output
    torch.Size([2, 8, 30, 30])
    """
    layers = list(layers)
    try:
        with torch.device("meta"):
            return _follow(model, layers, input_size, "meta")
    except Exception:
        # Meta tensors are fast, but fail with tensors of a model that are no buffers; fake tensors do not.
        with _silence(), FakeTensorMode(allow_non_fake_inputs=True):
            return _follow(model, layers, input_size, "cpu")


def _follow(model: nn.Module, layers: list[str], input_size: Sequence[int], device: str) -> DryRun:
    ghost = _ghost(model, device).eval()
    reference = next((p for p in ghost.parameters() if p.is_floating_point()), torch.empty(0))
    image = torch.empty(_BATCH, *input_size, dtype=reference.dtype, device=device).requires_grad_()
    watch = _Watch(ghost, layers)
    with torch.enable_grad(), watch:
        ghost(image * 1)  # no leaf, because layers must not change a leaf in place
    return DryRun(uses=watch.uses, readers=watch.readers)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    # torch logs a traceback for a size that does not fit, although the caller gets the exception.
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _ghost(model: nn.Module, device: str) -> nn.Module:
    """A copy whose tensors have shapes but no memory."""
    # No parameter requires a gradient, so that a tensor requires one exactly if it depends on the image.
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device=device)
    return copy.deepcopy(model, memo)


class _Watch(TorchFunctionMode):
    """Records the calls of the observed layers, and every operation on the weight of one that is not running."""

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
        if any(isinstance(x, Tensor) for x in results):  # not a query of shape, dtype or device
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
