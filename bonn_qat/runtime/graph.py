"""Graph: a network as data. A list of calls of known operators, written as JSON and read back without running code.

Each node is a table with a ``name`` and an ``op``: ``input``, ``tensor`` (of a name in the file; with a ``geometry``
the words of a convolution's weights), ``output``, or a function such as ``aten.add.Tensor`` with ``args`` and
``kwargs``. Arguments are numbers, texts, lists, null, or tables with one key: ``node``, ``dtype``, ``memory_format``,
``device``, ``layout``, ``number`` (inf, -inf, nan).
"""

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from bonn_qat.errors import InvalidData
from bonn_qat.runtime import operators
from bonn_qat.runtime.layout import Geometry, decode_weight, encode_weight, pack_words, unpack_words

_PYTHON: Mapping[str, Callable[..., Any]] = {
    f"python.{f.__name__}": f
    for f in (operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, operator.neg)
}
# Functions of tensors alone that torch counts neither as core nor as pointwise.
_MORE = {
    "_unsafe_view", "_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa", "adaptive_avg_pool2d",
    "adaptive_max_pool2d", "alias", "arange", "avg_pool2d", "batch_norm", "celu", "chunk", "concat",
    "constant_pad_nd", "contiguous", "conv1d", "conv2d", "conv3d", "cosine_similarity", "cumsum", "detach", "diff",
    "einsum", "elu", "expand_as", "flatten", "frobenius_norm", "full", "gather", "glu", "grid_sampler",
    "grid_sampler_2d", "group_norm", "hardsigmoid", "hardswish", "hstack", "index_select", "instance_norm",
    "l1_loss", "layer_norm", "lift_fresh_copy", "linalg_norm", "linalg_vector_norm", "linear",
    "local_response_norm", "log_sigmoid", "log_softmax", "masked_fill", "matmul", "max", "max_pool2d", "min",
    "mish", "movedim", "nan_to_num", "narrow", "new_full", "new_ones", "new_zeros", "norm", "normalize", "ones",
    "ones_like", "pad", "pixel_shuffle", "pixel_unshuffle", "prelu", "repeat_interleave", "reshape", "rms_norm",
    "roll", "rsub", "scaled_dot_product_attention", "select", "selu", "silu", "softmax", "softplus", "split",
    "square", "stack", "std", "std_mean", "swapaxes", "swapdims", "sym_size", "t", "tensor_split", "tile",
    "transpose", "type_as", "unbind", "unflatten", "unfold", "upsample_bicubic2d", "upsample_bilinear2d",
    "upsample_nearest2d", "var", "var_mean", "view_as", "vstack", "where", "zeros", "zeros_like",
}  # fmt: skip


def is_known(function: Any) -> bool:
    """Whether a graph may call it: it computes tensors from tensors, the same ones each time, and nothing else."""
    if function in _PYTHON.values():
        return True
    if not isinstance(function, torch._ops.OpOverload) or function._schema.is_mutable:
        return False
    if function.namespace == "bonn_qat":
        return True
    if function.namespace != "aten":
        return False
    if function._schema.name.removeprefix("aten::") in _MORE:
        return True
    is_random = torch.Tag.nondeterministic_seeded in function.tags
    return not is_random and bool({torch.Tag.core, torch.Tag.pointwise} & set(function.tags))


def name_of(function: Any) -> str:
    """The name of a function in a file."""
    return next((name for name, f in _PYTHON.items() if f is function), str(function))


def _function(name: object) -> Any:
    if isinstance(name, str) and name in _PYTHON:
        return _PYTHON[name]
    parts = name.split(".") if isinstance(name, str) else []
    if len(parts) == 3 and parts[0] in ("aten", "bonn_qat"):
        packet = getattr(getattr(torch.ops, parts[0]), parts[1], None)
        function = getattr(packet, parts[2], None)
        if function is not None and is_known(function):
            return function
    raise InvalidData(f"a packed network does not call {name!r}")


def describe(graph: fx.Graph, weights: Mapping[str, Geometry]) -> list[dict[str, Any]]:
    """The nodes of ``graph`` as data; ``weights`` are the tensors that hold a convolution's bits."""
    nodes: list[dict[str, Any]] = []
    for node in graph.nodes:
        if node.op == "placeholder":
            nodes.append({"op": "input", "name": node.name})
        elif node.op == "get_attr":
            entry = {"op": "tensor", "name": node.name, "tensor": node.target}
            geometry = weights.get(node.target)
            nodes.append(entry if geometry is None else entry | {"geometry": geometry.numbers})
        elif node.op == "output":
            nodes.append({"op": "output", "name": "output", "args": [_encode(node.args[0])]})
        else:
            arguments = {
                "args": [_encode(a) for a in node.args],
                "kwargs": {k: _encode(v) for k, v in node.kwargs.items()},
            }
            nodes.append({"op": name_of(node.target), "name": node.name, **arguments})
    return nodes


def _encode(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, list | tuple):
        return [_encode(item) for item in value]
    if isinstance(value, torch.dtype | torch.memory_format | torch.layout):
        kind = {torch.dtype: "dtype", torch.memory_format: "memory_format", torch.layout: "layout"}[type(value)]
        return {kind: str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": "cpu"}
    if isinstance(value, float) and not math.isfinite(value):
        return {"number": str(value)}
    return value


def _decode(value: Any, known: Mapping[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_decode(item, known) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((kind, content),) = value.items()
        if kind == "node" and content in known:
            return known[content]
        if kind == "number" and content in ("inf", "-inf", "nan"):
            return float(content)
        if kind == "device":
            return torch.device("cpu")
        types = {"dtype": torch.dtype, "memory_format": torch.memory_format, "layout": torch.layout}
        found = getattr(torch, content, None) if isinstance(content, str) else None
        if kind in types and isinstance(found, types[kind]):
            return found
    raise InvalidData(f"a packed network has no argument {value!r}")


def rebuild(nodes: object) -> tuple[fx.Graph, dict[str, Geometry]]:
    """The inverse of :func:`describe`. Raises InvalidData for what is no such list."""
    if not isinstance(nodes, list) or not all(isinstance(node, dict) for node in nodes):
        raise InvalidData("the nodes of a packed network are a list of tables")
    graph, known, weights = fx.Graph(), dict[str, fx.Node](), dict[str, Geometry]()
    ops = [node.get("op") for node in nodes]
    if ops.count("input") != 1 or ops.count("output") != 1 or ops[-1] != "output":
        raise InvalidData("a packed network has one input, and one output at its end")
    for entry in nodes:
        op, name = entry.get("op"), entry.get("name")
        if not isinstance(name, str) or not name.isidentifier() or name in known:
            raise InvalidData(f"{name!r} is no name of a node, or there are two of it")
        if op == "input":
            known[name] = graph.placeholder(name)
        elif op == "tensor":
            known[name] = graph.create_node("get_attr", _text(entry.get("tensor")), name=name)
            if "geometry" in entry:
                weights[_text(entry["tensor"])] = _geometry(entry["geometry"])
        elif op == "output":
            graph.output(_decode(_listed(entry.get("args"))[0], known))
        else:
            args, kwargs = _decode(_listed(entry.get("args")), known), entry.get("kwargs")
            if not isinstance(kwargs, dict):
                raise InvalidData(f"the kwargs of {name} are no table")
            decoded = {key: _decode(value, known) for key, value in kwargs.items()}
            known[name] = graph.create_node("call_function", _function(op), tuple(args), decoded, name=name)
    return graph, weights


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise InvalidData(f"{value!r} is no name of a tensor")
    return value


def _listed(value: object) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise InvalidData(f"{value!r} is no list of arguments")
    return value


def _geometry(numbers: object) -> Geometry:
    try:
        if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
            raise ValueError(f"{numbers!r} are no whole numbers")
        return Geometry.of(numbers)
    except ValueError as error:
        raise InvalidData(str(error)) from error


def to_words(octets: Tensor, geometry: Geometry) -> Tensor:
    """Weights as the kernels have them -> words."""
    return pack_words(decode_weight(octets, geometry))


def from_words(words: Tensor, geometry: Geometry) -> Tensor:
    """The inverse of :func:`to_words`. Raises InvalidData for words that do not fit."""
    expected = math.ceil(math.prod(geometry.weight_shape) / 64)
    if words.dtype != torch.int64 or words.shape != (expected,):
        raise InvalidData(f"the bits of {geometry} are {expected} words; got {tuple(words.shape)} of {words.dtype}")
    return encode_weight(unpack_words(words, geometry.weight_shape), geometry.groups)


def without_dispatcher(network: fx.GraphModule) -> fx.GraphModule:
    """The same network, whose calls of our operators go straight to their functions."""
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for node in network.graph.nodes:
        values[node] = graph.node_copy(node, values.__getitem__)
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "bonn_qat":
            values[node].target = getattr(operators, node.target._opname)
    return fx.GraphModule(network, graph, "DirectGraph")


def takes_planes(graph: fx.Graph) -> bool:
    """Whether the images are to come as planes, ``torch.contiguous_format``, and not ``torch.channels_last``."""
    return bool(graph.find_nodes(op="call_function", target=torch.ops.bonn_qat.max_pool2d.default))


def module(graph: fx.Graph, tensors: Mapping[str, Tensor]) -> tuple[fx.GraphModule, dict[str, str]]:
    """``graph`` as a module whose buffers are ``tensors``, and the names of these buffers, which have no dots."""
    root = nn.Module()
    names = {name: f"t{i}_{''.join(c if c.isalnum() else '_' for c in name)}" for i, name in enumerate(tensors)}
    planes = takes_planes(graph)
    kernels = {
        node.args[1].target
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.conv2d.default)
        if not (planes and node.args[0].op == "placeholder")
    }
    for name, tensor in tensors.items():
        # The images are channels_last, and a float convolution would bring its kernels there at each call.
        is_kernel = name in kernels and tensor.ndim == 4
        root.register_buffer(names[name], tensor.contiguous(memory_format=torch.channels_last) if is_kernel else tensor)
    copy = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        values[node] = copy.node_copy(node, values.__getitem__)
        if node.op == "get_attr":
            values[node].target = names[node.target]
    return fx.GraphModule(root, copy, "PackedGraph"), names
