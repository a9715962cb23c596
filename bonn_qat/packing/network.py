"""A network while it is packed: a graph of calls, and its tensors beside it."""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx

from bonn_qat.runtime import graph as graphs
from bonn_qat.runtime.layout import Geometry
from bonn_qat.runtime.packed import Input

aten, ours = torch.ops.aten, torch.ops.bonn_qat
_ALIASES = (aten.detach.default, aten.alias.default, aten.lift_fresh_copy.default)


class Value(NamedTuple):
    """Shape and type of a tensor that a node gives. A size that depends on the batch is text, its formula."""

    shape: tuple[int | str, ...]
    dtype: torch.dtype


class Network:
    """A graph with its ``tensors`` by name. ``weights`` are those that hold the bits of a convolution.

    ``batch`` is the number of images that the graph takes, None for any. ``inputs`` are its placeholders; ``outputs``
    the names of what it returns, empty where that is no dict.
    """

    inputs: tuple[Input, ...] = ()
    outputs: tuple[str, ...] = ()

    def __init__(
        self, graph: fx.Graph, tensors: dict[str, Tensor], weights: dict[str, Geometry], batch: int | None
    ) -> None:
        self.graph, self.tensors, self.weights, self.batch = graph, tensors, weights, batch

    def calls(self, function: Any) -> list[fx.Node]:
        """The calls of ``function``, in the order in which they run."""
        return list(self.graph.find_nodes(op="call_function", target=function))

    def constant(self, argument: Any) -> Tensor | None:
        """The tensor that an argument is, None for one that depends on the images."""
        is_tensor = isinstance(argument, fx.Node) and argument.op == "get_attr"
        return self.tensors[str(argument.target)] if is_tensor else None

    def add(self, name: str, tensor: Tensor, before: fx.Node) -> fx.Node:
        """A node for a new tensor, of this name or a similar one."""
        while name in self.tensors:
            name += "_"
        self.tensors[name] = tensor
        with self.graph.inserting_before(before):
            return self.graph.create_node("get_attr", name)

    def substitute(self, old: fx.Node, function: Any, *args: Any) -> fx.Node:
        """Call ``function`` in the place of ``old``, which is unused afterwards; the result has the same shape."""
        with self.graph.inserting_before(old):
            new = self.graph.call_function(function, args)
        new.meta = dict(old.meta)
        old.replace_all_uses_with(new)
        return new

    def remove(self, old: fx.Node, new: fx.Node) -> None:
        """Remove ``old``; its users take ``new``."""
        old.replace_all_uses_with(new)
        self.graph.erase_node(old)

    def simplify(self) -> None:
        """Remove unused nodes, aliases and signs of signs, and compute what does not depend on the images."""
        self.drop_unused()
        for node in list(self.graph.nodes):
            if node.op != "call_function":
                continue
            if node.target in _ALIASES and isinstance(node.args[0], fx.Node):
                self.remove(node, node.args[0])
            elif (signs := _sign_of_signs(node)) is not None:
                self.remove(node, signs)
            elif (result := self._constant_result(node)) is not None:
                self.remove(node, self.add(node.name, result.contiguous(), node))
        self.drop_unused()

    def _constant_result(self, node: fx.Node) -> Tensor | None:
        inputs = node.all_input_nodes
        # Weights that are unpacked for each call stay bits.
        if node.target is ours.unpack_signs.default or not inputs or any(self.constant(x) is None for x in inputs):
            return None
        function: Any = node.target
        args, kwargs = cast(Any, [fx.map_arg(part, self.constant) for part in (node.args, node.kwargs)])
        with torch.no_grad():
            result = function(*args, **kwargs)
        return result if isinstance(result, Tensor) else None

    def drop_unused(self) -> None:
        """Remove unused nodes and tensors."""
        self.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
        used = {node.target for node in self.graph.nodes if node.op == "get_attr"}
        self.tensors = {name: tensor for name, tensor in self.tensors.items() if name in used}

    def tensors_first(self) -> None:
        """Move the nodes of tensors to the beginning."""
        first, *_ = self.graph.find_nodes(op="placeholder")
        for node in self.graph.find_nodes(op="get_attr"):
            first.prepend(node)

    def unknown_calls(self) -> list[str]:
        """The functions that it calls and that a packed network may not."""
        functions = {node.target for node in self.graph.nodes if node.op == "call_function"}
        return sorted(graphs.name_of(function) for function in functions if not graphs.is_known(function))


def _sign_of_signs(node: fx.Node) -> fx.Node | None:
    """The signs s of which ``node`` is ``sign((s >= 0) - 1/2) = s``, as :func:`bonn_qat.functional.sign` is traced."""
    inner = _argument_of(node, aten.sign.default)
    for function, number in ((aten.sub.Tensor, 0.5), (aten._to_copy.default, None), (aten.ge.Scalar, 0)):
        if inner is None or inner.target is not function or (number is not None and inner.args[1] != number):
            return None
        inner = _argument_of(inner, function)
    if inner is not None and inner.target is aten.clone.default:
        inner = _argument_of(inner, aten.clone.default)
    return inner if inner is not None and inner.target is ours.unpack_signs.default else None


def _argument_of(node: Any, function: Any) -> fx.Node | None:
    """The first argument of a call of ``function``, None for another node."""
    is_call = isinstance(node, fx.Node) and node.target is function and isinstance(node.args[0], fx.Node)
    return node.args[0] if is_call else None
