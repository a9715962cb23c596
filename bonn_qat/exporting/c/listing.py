"""The nodes of a packed network as text, a line for each: name, result, and the call in the header's names."""

import operator
from typing import Any, cast

from torch import Tensor, fx

from bonn_qat.exporting.c.network import BOTH, ELEMENTWISE, SIGN, SIGN_OF, Network, arguments
from bonn_qat.runtime import graph as graphs


def listing(network: Network) -> list[str]:
    """A line for each node but tensors, in the order in which they run."""
    convolutions = list(network.convolutions.values())
    kinds = {node: _kind(value) for node, value in network.values.items()}
    kinds |= {each.codes: f"signs {(1, *each.input)}" for each in convolutions}
    readers = {each.sign: each.epilogue.struct for each in reversed(convolutions)}
    nodes = [node for node in network.nodes if node.op != "get_attr"]
    first = max(len(node.name) for node in nodes)
    second = max(len(kinds[node]) for node in nodes)
    return [
        f"  {node.name:{first}}  {kinds[node]:{second}}  {_call(network, node, readers.get(node))}" for node in nodes
    ]


def _kind(value: Any) -> str:
    """Type and shape of a node's result; empty for several results, which other nodes take apart."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return "" if isinstance(value, list | tuple) else str(value)


def _call(network: Network, node: fx.Node, reader: str | None) -> str:
    """The call of a node; ``reader`` is the convolution that reads its signs."""

    def text(value: Any) -> str:
        if isinstance(value, list | tuple):
            return f"[{', '.join(map(text, value))}]"
        if isinstance(value, fx.Node):
            return network.arrays[network.tensors[value]] if value in network.tensors else value.name
        return str(value)

    if node.op != "call_function":
        return "the image" if node.op == "placeholder" else f"gives {text(node.args[0])}"
    if node.target is operator.getitem and cast(fx.Node, node.args[0]).target is BOTH:
        return f"the {'signs' if node.args[1] else 'map'} of {text(node.args[0])}"
    if node.target is SIGN:
        return f"sign({text(arguments(node)['x'])}) for {reader}"
    if node not in network.structs:
        keywords = [f"{key}={text(value)}" for key, value in node.kwargs.items()]
        return f"{graphs.name_of(node.target)}({', '.join([*map(text, node.args), *keywords])})"
    given = arguments(node)
    inputs = [given.get("codes", given.get("x")), given["residual"]]
    operands = ", ".join([network.structs[node], *(text(value) for value in inputs if value is not None)])
    call = f"{'elementwise' if node.target is ELEMENTWISE else 'convolve'}({operands})"
    if node.target is SIGN_OF:
        return f"sign({call}) for {reader}"
    return f"{call}, and its sign for {reader}" if node.target is BOTH else call
