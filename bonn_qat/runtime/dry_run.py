"""Dry run of a packed graph on meta tensors: shapes and memory are known before anything is allocated."""

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, fx

from bonn_qat.errors import InvalidData, first_line
from bonn_qat.files.plain import shown
from bonn_qat.runtime import allowed, shapes
from bonn_qat.runtime import graph as graphs
from bonn_qat.runtime.scratch import scratch

MEMORY = 2**32  # bytes that one image may need at once, in addition to the file's tensors
_PIECES = 2**18  # tensors in lists over all calls


def dry_run(
    graph: fx.Graph, tensors: Mapping[str, Tensor], inputs: Sequence[tuple[Sequence[int], torch.dtype]], batch: int
) -> int:
    """Bytes that ``batch`` samples of ``inputs`` ``(size, type)`` need at once, in addition to ``tensors``.

    Only types and shapes are computed, no values. Raises InvalidData where types, shapes or arguments do not fit, and
    for more than ``MEMORY`` bytes per image.
    """
    given = [torch.empty((batch, *size), dtype=kind, device="meta") for size, kind in inputs]
    return _DryRun(graph, {name: tensor.to("meta") for name, tensor in tensors.items()}, given, batch).run()


@final
class _DryRun:
    """Runs a graph on meta tensors, and counts the bytes that a real run would need."""

    def __init__(self, graph: fx.Graph, tensors: Mapping[str, Tensor], inputs: Sequence[Tensor], batch: int) -> None:
        self.graph, self.tensors = graph, tensors
        self.inputs = dict(zip(graph.find_nodes(op="placeholder"), inputs, strict=True))
        self.values: dict[fx.Node, Any] = {}
        self.done: dict[Any, tuple[Any, int]] = {}  # calls, because blocks repeat them
        self.beside = 0  # bytes that the call of a node needs only while it runs
        self.held, self.most, self.limit = 0, 0, MEMORY * max(1, batch)  # bytes
        self.pieces = 0

    def run(self) -> int:
        """The bytes needed at once. Raises InvalidData for a call that does not fit."""
        lasts = _last_uses(self.graph)
        for node in self.graph.nodes:
            if node.op == "output":
                self._finish(node)
                break
            try:
                self.values[node] = self._value(node)
            except InvalidData:
                raise
            except Exception as error:  # whatever torch raises
                raise InvalidData(f"{_described(node)} cannot be computed: {first_line(error)[:200]}") from error
            self._count(node, self.values[node])
            for used in lasts[node]:
                self.held -= _bytes(used, self.values.pop(used))
        return self.most

    def _value(self, node: fx.Node) -> Any:
        self.beside = 0
        if node.op == "placeholder":
            return self.inputs[node]
        if node.op == "get_attr":
            return self.tensors[str(node.target)]
        function: Any = node.target
        args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), self._ready)
        if function in graphs.PYTHON.values():
            return _calculated(function, args)
        call = function, _signature(args), _signature(kwargs)
        if call not in self.done:
            result = _called(function, args, kwargs)
            self.done[call] = result, scratch(function, args, kwargs, result)
        result, self.beside = self.done[call]
        return result

    def _ready(self, argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return self.values[argument]
        return torch.device("meta") if isinstance(argument, torch.device) else argument

    def _count(self, node: fx.Node, value: Any) -> None:
        if not isinstance(value, int | float | Tensor | list | tuple):
            raise InvalidData(f"{_described(node)} is neither a tensor nor a number")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise InvalidData(f"{_described(node)} is a number of more than 64 bits")
        tensors = allowed.tensors(value)
        if max((tensor.ndim for tensor in tensors), default=0) > allowed.AXES:
            raise InvalidData(f"{_described(node)} is a tensor of more than {allowed.AXES} axes")
        # A tensor without elements takes no memory; what an operator makes of its other axes may.
        if any(math.prod(max(1, n) for n in tensor.shape) > self.limit for tensor in tensors):
            raise InvalidData(f"{_described(node)} would need too much memory: an image may need {MEMORY:,} bytes")
        self.pieces += len(tensors) - 1
        self.held += _bytes(node, value)
        self._need(node, self.held + self.beside)

    def _need(self, node: fx.Node, needed: int) -> None:
        self.most = max(self.most, needed)
        if needed > self.limit or self.pieces > _PIECES:
            raise InvalidData(f"{_described(node)} would need too much memory: an image may need {MEMORY:,} bytes")

    def _finish(self, node: fx.Node) -> None:
        found: Any = fx.node.map_aggregate(node.args[0], self._ready)
        flat = found if isinstance(found, list | tuple) else [found]
        if not flat or not all(isinstance(tensor, Tensor) for tensor in flat):
            raise InvalidData("a packed network returns a tensor, or a list or tuple of tensors")
        if not graphs.gives_new_tensors(self.graph):  # the caller gets copies
            self._need(node, self.held + sum(tensor.numel() * tensor.element_size() for tensor in flat))


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Node -> the nodes whose values are not needed after it."""
    lasts: dict[fx.Node, list[fx.Node]] = {}
    seen: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        unseen = [used for used in [*node.all_input_nodes, node] if used not in seen]
        seen.update(unseen)
        lasts[node] = unseen
    return lasts


def _called(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    allowed.check(function, args, kwargs)
    schema = function._schema
    if any(argument.name == "device" for argument in schema.arguments) and not allowed.tensors((args, kwargs)):
        kwargs = {**kwargs, "device": torch.device("meta")}
    if schema.name == "aten::view":
        # Strides are not known for sure here; a view that is not possible is refused in the real run.
        function = torch.ops.aten.reshape.default
    return shapes.result_of(function, args, kwargs)


def _calculated(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    if function is operator.getitem:
        whole, place = args
        if isinstance(whole, list | tuple) and type(place) is int:
            return whole[place]
    elif all(isinstance(argument, int | float) for argument in args):
        return function(*args)
    raise InvalidData(f"{function.__name__} does not take {shown(args)}")


def _signature(value: Any) -> Any:
    """A key that two arguments share if they lead to the same types and shapes."""
    if isinstance(value, Tensor):
        return value.shape, value.dtype
    if isinstance(value, list | tuple):
        return tuple(map(_signature, value))
    if isinstance(value, dict):
        return tuple((key, _signature(item)) for key, item in value.items())
    return type(value), value


def _bytes(node: fx.Node, value: Any) -> int:
    if node.op == "get_attr":
        return 0  # already allocated
    return sum(tensor.numel() * tensor.element_size() for tensor in allowed.tensors(value))


def _described(node: fx.Node) -> str:
    return f"the node {node.name} ({graphs.name_of(node.target)})"
