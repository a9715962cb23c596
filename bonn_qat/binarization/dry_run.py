"""dry_run: model, size -> DryRun, what each layer sees in a forward pass, without computing anything.

The passes run on copies whose tensors have shapes but no memory, so that a model of any size, on any device, takes only
the time of its Python code. There are four, because a model may take another path in training, without gradients, and
under autocast. From layer to layer the data is followed in two ways: every operation hands on what its inputs derive
from, and autograd's graph says what of that a gradient can go through.
"""

import contextlib
import functools
import itertools
import logging
import random
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import Node
from torch.utils._python_dispatch import TorchDispatchMode

from bonn_qat.binarization.copies import CannotBeCopied, ghost
from bonn_qat.binarization.fast_paths import close_fast_paths
from bonn_qat.binarization.guesses import Guesses
from bonn_qat.conv_types import CONVOLUTIONS, macs
from bonn_qat.errors import is_out_of_memory
from bonn_qat.inputs import Inputs

BATCH = 2


@dataclass(frozen=True, kw_only=True)
class Use:
    """One layer's first call: its position among all calls, and the shapes of input and output.

    ``sees_image`` is false if the input does not depend on the image, such as a table of positions. ``reads_image``:
    the input derives from the image with no layer between, ``reads_layers``: and from these layers with no other
    between.
    """

    order: int
    input: torch.Size
    output: torch.Size
    sees_image: bool
    reads_image: bool
    reads_layers: frozenset[str]


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """What was seen in all passes; ``uses`` and ``macs`` are those of the first.

    ``uses``: the layers that were called, by name. ``readers``: which other module read a layer's weight.
    ``inputs``: the layers that read the image. ``outputs``: those that produce an output: it derives from no other
    layer, or no other layer learns through them. ``macs``: MACs of each layer for one image. ``channels``: how many
    each module that is no layer reads, where that is axis 1 and the same in every call. ``any_layout``: whether the
    model also runs where convolutions give their outputs in ``torch.channels_last``, which some views refuse.
    """

    uses: Mapping[str, Use]
    readers: Mapping[str, str]
    inputs: frozenset[str]
    outputs: frozenset[str]
    macs: Mapping[str, int]
    channels: Mapping[str, int]
    any_layout: bool


class _Pass(NamedTuple):
    training: bool
    grad: bool
    devices: tuple[str, str]  # those to try
    serves: bool = False  # one image, under autocast


# Meta tensors are fast. Fake tensors know values that are constant, and their device is one that can compute, which
# fast paths without gradients ask for. These libraries have one such path, which binarize closes.
_PASSES = (
    _Pass(training=False, grad=True, devices=("meta", "cpu")),
    _Pass(training=False, grad=False, devices=("cpu", "meta")),
    _Pass(training=False, grad=False, devices=("cpu", "meta"), serves=True),
    _Pass(training=True, grad=True, devices=("meta", "cpu")),
)
_SAME_WITHOUT_GRAD = {"torch", "torchvision", "timm", "bonn_qat"}


def dry_run(model: nn.Module, layers: Iterable[str], inputs: Inputs | Sequence[int]) -> DryRun:
    """Pass two samples like ``inputs``, or images of that size ``(C, H, W)``, through ``model`` and observe ``layers``.

    It passes them in evaluation mode with gradients and in inference mode, then one sample without gradients under
    autocast, and two in training mode; what the model refuses is left out. Not seen is what code does for more images,
    in other combinations of these modes, and only while torch traces it, which pack and export compare with the model.
    The model is not changed. Raises CannotBeCopied, and whatever the model raises in evaluation mode.

    >>> dry_run(nn.Sequential(nn.Conv2d(3, 8, 3)), ["0"], (3, 32, 32)).uses["0"].output
    torch.Size([2, 8, 30, 30])
    """
    layers = list(layers)
    inputs = inputs if isinstance(inputs, Inputs) else Inputs.images(inputs)
    seen: list[_Watch] = []
    error: Exception | None = None
    libraries = {type(module).__module__.partition(".")[0] for module in model.modules()}
    for one in _PASSES:
        if seen and not one.grad and libraries <= _SAME_WITHOUT_GRAD:
            continue
        if one.training and not seen:
            break
        try:
            seen.append(_try(model, layers, inputs, one))
        except Exception as caught:  # a model may raise anything
            if isinstance(caught, CannotBeCopied) or is_out_of_memory(caught):
                raise
            error = error or caught
    if not seen:
        assert error is not None
        raise error
    readers = {name: reader for watch in reversed(seen) for name, reader in watch.readers.items()}
    counts: dict[str, set[int]] = {}
    for watch in seen:
        for name, found in watch.channels.items():
            counts.setdefault(name, set()).update(found)
    return DryRun(
        uses=seen[0].uses,
        readers=readers,
        inputs=frozenset().union(*(watch.inputs for watch in seen)),
        outputs=frozenset().union(*(watch.outputs() for watch in seen)),
        macs=seen[0].macs,
        channels={name: count for name, (count, *others) in counts.items() if count and not others},
        any_layout=all(watch.channels_last for watch in seen),
    )


def _try(model: nn.Module, layers: list[str], inputs: Inputs, one: _Pass) -> "_Watch":
    caught: list[Exception] = []
    for device, channels_last in itertools.product(one.devices, (True, False)):
        try:
            return _follow(model, layers, inputs, one, device, channels_last)
        except Exception as error:
            if isinstance(error, CannotBeCopied) or is_out_of_memory(error):
                raise
            caught.append(error)
    raise caught[-1]


def _follow(
    model: nn.Module, layers: list[str], inputs: Inputs, one: _Pass, device: str, channels_last: bool
) -> "_Watch":
    fake = FakeTensorMode(allow_non_fake_inputs=True) if device == "cpu" else None
    copied = ghost(model, fake).train(one.training)
    close_fast_paths(copied)
    with _unnoticed(), fake or torch.device(device):
        reference = next((p for p in copied.parameters() if p.is_floating_point()), torch.empty(0))
        count = 1 if one.serves else BATCH

        def given(x: Tensor) -> Tensor:
            kind = reference.dtype if x.is_floating_point() else x.dtype
            made = torch.empty(count, *x.shape[1:], dtype=kind, device=device)
            # No leaf, because layers must not change a leaf in place.
            return made.requires_grad_() * 1 if one.grad and x.is_floating_point() else made

        watch = _Watch(copied, layers, Guesses() if fake else None, channels_last)
        autocast = torch.autocast("cpu", enabled=one.serves, cache_enabled=False)
        # Not both at once: in inference mode autocast would not see into operations such as einsum.
        inference = torch.inference_mode(not one.grad and not one.serves)
        with inference, torch.set_grad_enabled(one.grad), autocast, watch:
            passed = inputs.map(given)
            watch.start(passed.tensors)
            watch.finish(passed.call(copied))
    return watch


@contextlib.contextmanager
def _unnoticed() -> Iterator[None]:
    """The caller's random numbers stay as they are, compiled parts run as they were written, and nothing is told."""
    # torch logs a traceback for a size that does not fit, although the caller gets the exception.
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    state = random.getstate()
    eager: Any = contextlib.nullcontext()
    if "torch._dynamo" in sys.modules:
        eager = torch.compiler.set_stance("force_eager")
    try:
        with eager, torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = before
        random.setstate(state)


class _Origin(NamedTuple):
    """What a tensor derives from: ``layers`` and the ``image`` with no layer between, ``sees`` it at all, ``weights``.

    The last are the layers whose weight it is, or is made of.
    """

    layers: frozenset[str] = frozenset()
    image: bool = False
    sees: bool = False
    weights: frozenset[str] = frozenset()


_NOTHING = _Origin()
_NORMS = {"native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "native_layer_norm"}


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the image from layer to layer, and notes every operation on the weight of a layer that is not running.

    Hooks would be seen by the model's code, which may take another path because of them, so forward methods are
    replaced.
    """

    def __init__(self, model: nn.Module, layers: Iterable[str], guesses: Guesses | None, channels_last: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.uses: dict[str, Use] = {}
        self.readers: dict[str, str] = {}
        self.macs: dict[str, int] = {}
        self.channels: dict[str, set[int]] = {}  # 0 where they are unknown
        self.inputs: set[str] = set()
        self._sole: set[str] = set()  # the only layer behind an output
        self._read: set[str] = set()  # read by another layer
        self._guesses = guesses
        self.channels_last = channels_last
        self._running: list[str] = []
        # By storage, so that views and changes in place share one entry; the tensor keeps the key from being reused.
        self._origins: dict[int, tuple[_Origin, Tensor]] = {}
        self._nodes: dict[Node, frozenset[str]] = {}
        self._without_grad: set[str] = set()  # layers whose output autograd does not follow
        self._convolutions: set[str] = set()
        layers = set(layers)
        for name, module in model.named_modules():
            if isinstance(module, CONVOLUTIONS):
                self._convolutions.add(name)
            if isinstance(module, torch.jit.ScriptModule):
                continue
            weight = module._parameters.get("weight")
            if name in layers and weight is not None:
                self._set(weight, _Origin(weights=frozenset([name])))
            module.forward = self._followed(name, module.forward, module if name in layers else None)

    def start(self, inputs: Iterable[Tensor]) -> None:
        """``inputs`` are those of the model."""
        for tensor in inputs:
            # Whole numbers are looked up or masks; a layer behind them does not read the numbers.
            self._set(tensor, _Origin(image=tensor.is_floating_point(), sees=True))

    def finish(self, output: object) -> None:
        """``output`` is the model's."""
        for tensor in tensors_in(output):
            behind = self._behind(tensor.grad_fn) if tensor.requires_grad else self._origin(tensor).layers
            if len(behind) == 1:
                self._sole |= behind

    def outputs(self) -> set[str]:
        """The layers that produce an output."""
        return self._sole | (self.uses.keys() - self._read)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in _NORMS:
            return self._norm(*args)
        result = self._guesses.call(func, args, kwargs or {}) if self._guesses else func(*args, **(kwargs or {}))
        if name.endswith("_like") or name.startswith("new_"):  # only the shape is read
            return result
        # Of the second argument of `x.to(weight)` and `x.view_as(weight)` only type and shape are read.
        sources = args[:1] if name == "to" or name.endswith("_as") else (args, kwargs)
        origin = _joined(self._origin(x) for x in tensors_in(sources))
        results = list(tensors_in(result))
        for owner in origin.weights.difference(self._running) if results else ():
            self.readers.setdefault(owner, self._running[-1] if self._running else "")
        if origin.layers or origin.sees:
            origin = origin._replace(weights=frozenset())
        for tensor in results:
            if origin != _NOTHING:
                self._set(tensor, _joined([origin, self._origin(tensor)]))
        return result

    def _norm(self, x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        # torch would decompose it, which takes longer than all the rest of a convolutional network.
        result = torch.empty_like(x)
        self._set(result, self._origin(x))
        return result, x.new_empty(0), x.new_empty(0)

    def _origin(self, tensor: Tensor) -> _Origin:
        found = self._origins.get(_storage(tensor))
        return found[0] if found else _NOTHING

    def _set(self, tensor: Tensor, origin: _Origin) -> None:
        self._origins[_storage(tensor)] = (origin, tensor)

    def _followed(self, name: str, forward: Callable[..., Any], layer: nn.Module | None) -> Callable[..., Any]:
        within = name + "."

        @functools.wraps(forward)
        def call(*args: Any, **kwargs: Any) -> Any:
            if layer is None and args and isinstance(args[0], Tensor):
                self.channels.setdefault(name, set()).add(self._channels(args[0]))
            given = list(tensors_in((args, kwargs))) if layer is not None else []
            origin = self._enter(name, given)
            shape = given[0].shape if given else None
            self._running.append(name)
            try:
                output = forward(*args, **kwargs)
                if (
                    self.channels_last
                    and name in self._convolutions
                    and isinstance(output, Tensor)
                    and output.ndim == 4
                ):
                    output = output.contiguous(memory_format=torch.channels_last)
            finally:
                self._running.pop()
            results = list(tensors_in(output)) if layer is not None else []
            if layer is None or shape is None or not results:
                return output
            for tensor in results:
                inner = self._origin(tensor).layers
                own = {name, *(x for x in inner if x.startswith(within))}  # a layer may consist of others
                self._set(tensor, _Origin(layers=frozenset(own), sees=origin.sees))
                if tensor.grad_fn is None:
                    self._without_grad.add(name)
                else:
                    self._nodes[tensor.grad_fn] = frozenset(own)
            self.macs[name] = self.macs.get(name, 0) + macs(layer, shape, results[0].shape) // BATCH
            if name not in self.uses:
                self.uses[name] = Use(
                    order=len(self.uses), input=shape, output=results[0].shape,
                    sees_image=origin.sees, reads_image=origin.image, reads_layers=origin.layers,
                )  # fmt: skip
            return output

        return call

    def _enter(self, name: str, given: list[Tensor]) -> _Origin:
        """Note what the layer reads."""
        origin = _joined(map(self._origin, given))
        if origin.image:
            self.inputs.add(name)
        for tensor in given:
            learns = self._behind(tensor.grad_fn) | self._without_grad
            self._read |= (self._origin(tensor).layers & learns) - {name}
        return origin

    def _channels(self, x: Tensor) -> int:
        """Those of features ``(B, C)`` from linear layers and of maps ``(B, C, ...)`` from convolutions; else 0."""
        makers = self._origin(x).layers
        shapes = [self.uses[name].output for name in makers]
        is_map = x.ndim > 2
        if not makers or x.ndim < 2 or any(len(shape) != x.ndim for shape in shapes):
            return 0
        if is_map != (makers <= self._convolutions):
            return 0
        sizes = [shape[2:] for shape in shapes]
        if is_map and x.shape[1:-1] in sizes and x.shape[2:] not in sizes:
            return 0  # permuted: its channels are the last axis
        sums = 1  # a bit for each sum of channels: some of the maps may have been added up, and others concatenated
        for shape in shapes:
            sums |= sums << shape[1]
        is_first, is_last = (sums >> x.shape[axis] & 1 for axis in (1, -1))
        # A map may have been split or shuffled too, as long as its channels do not seem to be the last axis.
        return x.shape[1] if is_first or (is_map and not is_last) else 0

    def _behind(self, node: Node | None) -> frozenset[str]:
        """The layers from which a gradient that arrives at ``node`` comes to, with no layer between."""
        stack = [node] if node is not None else []
        while stack:
            top = stack[-1]
            if top in self._nodes:
                stack.pop()
                continue
            before = [n for n, _ in top.next_functions if n is not None]
            missing = [n for n in before if n not in self._nodes]
            if missing:
                stack += missing
            else:
                self._nodes[top] = frozenset().union(*(self._nodes[n] for n in before))
        return self._nodes[node] if node is not None else frozenset()


def _joined(origins: Iterable[_Origin]) -> _Origin:
    all_ = [x for x in origins if x is not _NOTHING]
    if len(all_) < 2:
        return all_[0] if all_ else _NOTHING
    layers, weights = (frozenset().union(*parts) for parts in ((x.layers for x in all_), (x.weights for x in all_)))
    return _Origin(layers, any(x.image for x in all_), any(x.sees for x in all_), weights)


def _storage(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):  # sparse and nested tensors have none
        return -id(tensor)


def tensors_in(value: object, depth: int = 8) -> Iterator[Tensor]:
    """Every tensor in ``value``, which may be nested: sequences, mappings and objects with attributes."""
    if isinstance(value, Tensor):
        yield value
        return
    if depth == 0 or value is None or isinstance(value, str | bytes | int | float | complex | nn.Module | type):
        return
    parts: Iterable[object]
    if isinstance(value, Mapping):
        parts = value.values()
    elif isinstance(value, Collection):
        parts = value
    else:
        slots = (name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ()))
        parts = [*getattr(value, "__dict__", {}).values(), *(getattr(value, name, None) for name in slots)]
    for part in parts:
        yield from tensors_in(part, depth - 1)
