"""Graph: a network as data, a list of calls of known operators, written as JSON and read back without running code.

Each node is a table with a ``name`` and an ``op``: ``input``, ``tensor`` (of a name in the file; with a ``geometry``
it holds the bits of a convolution), ``output``, or a function such as ``aten.add.Tensor`` with ``args`` and
``kwargs``. Arguments are numbers, texts, lists, null, or tables with one key: ``node``, ``dtype``, ``memory_format``,
``device``, ``layout``, ``number`` (inf, -inf, nan).
"""

import keyword
import linecache
import math
import operator
import re
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from bonn_qat.errors import InvalidData
from bonn_qat.files.plain import shown
from bonn_qat.runtime import allowed, operators
from bonn_qat.runtime.layout import Geometry, decode_weight, encode_words, pack_words

NODES = 20_000  # at most; timm's largest networks have a few thousand
_ROOM, _GROWTH = 2**26, 32  # weights may need 2**26 bytes in memory, and 32 more for each byte in the file
_LETTERS = 500  # of a node's name, at most
_GROUPS = 2**16  # at most, of all convolutions together: each takes time
PYTHON: Mapping[str, Callable[..., Any]] = {  # on numbers, and the first on lists of tensors
    f"python.{f.__name__}": f
    for f in (operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, operator.neg)
}
_KINDS: Mapping[str, type] = {
    "ScalarType": torch.dtype, "Layout": torch.layout, "MemoryFormat": torch.memory_format, "Device": torch.device,
}  # fmt: skip
_FUNCTION = re.compile(r"[a-z]\w*\.\w+\.\w+", re.ASCII)
_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_TYPES: Mapping[str, Mapping[str, Any]] = {
    "dtype": {
        str(t).removeprefix("torch."): t
        for t in (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16,
                  torch.bfloat16, torch.float32, torch.float64)
    },
    "memory_format": {
        str(f).removeprefix("torch."): f
        for f in (torch.contiguous_format, torch.preserve_format, torch.channels_last, torch.channels_last_3d)
    },
    "layout": {"strided": torch.strided},
}  # fmt: skip


def is_known(function: Any) -> bool:
    """Whether a graph may call ``function``: it computes tensors from tensors, deterministically, and nothing else."""
    if function in PYTHON.values():
        return True
    if not isinstance(function, torch._ops.OpOverload):
        return False
    return function.namespace == "bonn_qat" or str(function) in allowed.GROUP_OF


def name_of(function: Any) -> str:
    """The name of a function in a file."""
    return next((name for name, f in PYTHON.items() if f is function), str(function))


def _function(name: object) -> Any:
    if isinstance(name, str) and name in PYTHON:
        return PYTHON[name]
    if isinstance(name, str) and _FUNCTION.fullmatch(name):
        namespace, operation, overload = name.split(".")
        if namespace in ("aten", "bonn_qat"):
            function = getattr(getattr(getattr(torch.ops, namespace), operation, None), overload, None)
            if function is not None and is_known(function):
                return function
    raise InvalidData(f"a packed network cannot call {shown(name)}")


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
        if isinstance(content, str):
            if kind == "node" and content in known:
                return known[content]
            if kind == "number" and content in ("inf", "-inf", "nan"):
                return float(content)
            if kind == "device":
                return torch.device("cpu")
            if kind in _TYPES and content in _TYPES[kind]:
                return _TYPES[kind][content]
    raise InvalidData(f"a packed network cannot have the argument {shown(value)}")


def rebuild(nodes: object) -> tuple[fx.Graph, dict[str, Geometry]]:
    """The inverse of :func:`describe`. Raises InvalidData for data that is not such a list.

    ``nodes`` is plain data that passed :func:`bonn_qat.files.plain.check`.
    """
    if not isinstance(nodes, list) or not all(
        isinstance(node, dict) and isinstance(node.get("op"), str) for node in nodes
    ):
        raise InvalidData("the nodes of a packed network are a list of tables, each with an op")
    if len(nodes) > NODES:
        raise InvalidData(f"a packed network has {len(nodes):,} nodes; at most {NODES:,} are allowed")
    graph, known, weights = fx.Graph(), dict[str, fx.Node](), dict[str, Geometry]()
    ops = [node.get("op") for node in nodes]
    if not ops.count("input") or ops.count("output") != 1 or ops[-1] != "output":
        raise InvalidData("a packed network has inputs, and one output at its end")
    for entry in nodes:
        if entry["op"] == "output":
            _expect_keys(entry, "name", "args")
            graph.output(_decode(_listed(entry["args"])[0], known))
            continue
        node = _node(graph, entry, known)
        # Names become identifiers: torch.fx writes the network as Python code.
        if node.name != entry["name"] or node.name == "self" or node.name in known:
            raise InvalidData(f"{shown(entry['name'])} is not a valid name of a node, or occurs twice")
        known[node.name] = node
        if "geometry" in entry:
            weights[node.target] = _geometry(entry["geometry"])  # type: ignore[index]
    return graph, weights


def _node(graph: fx.Graph, entry: Mapping[str, Any], known: Mapping[str, fx.Node]) -> fx.Node:
    op, name = entry["op"], entry.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name) or len(name) > _LETTERS or keyword.iskeyword(name):
        raise InvalidData(f"{shown(name)} is not a valid name of a node, or occurs twice")
    if op == "input":
        _expect_keys(entry, "name")
        return graph.placeholder(name)
    if op == "tensor":
        _expect_keys(entry, "name", "tensor", *(["geometry"] if "geometry" in entry else []))
        if not isinstance(entry["tensor"], str):
            raise InvalidData(f"{shown(entry['tensor'])} is not the name of a tensor")
        return graph.create_node("get_attr", entry["tensor"], name=name)
    _expect_keys(entry, "name", "args", "kwargs")
    function, args = _function(op), _decode(_listed(entry["args"]), known)
    if not isinstance(entry["kwargs"], dict):
        raise InvalidData(f"the kwargs of {name} are not a table")
    kwargs = {key: _decode(value, known) for key, value in entry["kwargs"].items()}
    # As torch writes them: only keyword-only arguments have names. These become Python code, too.
    arguments = [] if op in PYTHON else function._schema.arguments
    if unknown := sorted(kwargs.keys() - {argument.name for argument in arguments if argument.kwarg_only}):
        raise InvalidData(f"{op} has no argument {shown(unknown[0])}")
    needed = [argument for argument in arguments if not argument.kwarg_only and not argument.has_default_value()]
    if len(args) < len(needed):
        raise InvalidData(f"{op} takes {len(needed)} arguments; got {len(args)}")
    given = [*zip(arguments, args, strict=False), *((a, kwargs[a.name]) for a in arguments if a.name in kwargs)]
    for argument, value in given:
        kind = re.sub(r"Optional\[(\w+)\]", r"\1", str(argument.real_type))
        # torch also takes a number for these, and uses it as an index into a table without checking it.
        if kind in _KINDS and value is not None and not isinstance(value, _KINDS[kind]):
            raise InvalidData(f"{op} does not take {shown(value)} for {argument.name}")
    lists = [argument for argument in args if isinstance(argument, list | tuple)]
    if op.startswith("bonn_qat.") and any(isinstance(item, fx.Node) for numbers in lists for item in numbers):
        raise InvalidData(f"{op} takes lists of whole numbers, not of other nodes' results")
    return graph.create_node("call_function", function, tuple(args), kwargs, name=name)


def _expect_keys(entry: Mapping[str, Any], *keys: str) -> None:
    if odd := sorted(entry.keys() ^ {"op", *keys}):
        raise InvalidData(
            f"the node {shown(entry.get('name'))} of a packed network has a missing or unknown key {shown(odd[0])}"
        )


def _listed(value: object) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise InvalidData(f"{shown(value)} is not a list of arguments")
    return value


def _geometry(numbers: object) -> Geometry:
    try:
        if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
            raise ValueError(f"{shown(numbers)} are not whole numbers")
        return operators.geometry_of(numbers)
    except (ValueError, RuntimeError) as error:
        raise InvalidData(str(error)) from error


def to_words(held: Tensor, geometry: Geometry) -> Tensor:
    """Weights in the layout of the kernels -> words."""
    return pack_words(decode_weight(held, geometry))


def check_words(words: Mapping[str, Tensor], weights: Mapping[str, Geometry]) -> None:
    """Raise InvalidData for words that are not the bits of ``weights``, by name, or that need far more memory.

    A group's channels are padded to 32 and its filters to 16, so that a file could ask for 512 times its size.
    """
    for name, geometry in weights.items():
        expected = -(-math.prod(geometry.weight_shape) // 64)
        if words[name].dtype != torch.int64 or words[name].shape != (expected,):
            raise InvalidData(
                f"the bits of {geometry} are {expected} words; got {tuple(words[name].shape)} of {words[name].dtype}"
            )
    needed = sum(4 * math.prod(geometry.words_shape) for geometry in weights.values())
    if needed > _ROOM + _GROWTH * sum(8 * len(words[name]) for name in weights):
        raise InvalidData(f"its bits would need {needed:,} bytes in memory: too many small groups")
    if (groups := sum(geometry.groups for geometry in weights.values())) > _GROUPS:
        raise InvalidData(f"its convolutions have {groups:,} groups; at most {_GROUPS:,} are allowed")


def from_words(words: Tensor, geometry: Geometry) -> Tensor:
    """The inverse of :func:`to_words`, for words that passed :func:`check_words`."""
    return encode_words(words, geometry)


_NEW = {
    *(name for name, group in allowed.GROUP_OF.items()
      if group in ("elementwise", "reductions", "norms", "windows", "products", "attention", "convolutions")),
    "aten.cat.default", "aten.clone.default", "aten.stack.default",
} - {"aten.positive.default", "aten.einsum.default"}  # fmt: skip


def gives_new_tensors(graph: fx.Graph) -> bool:
    """Whether every output certainly is memory of its own: not a tensor of the network, the images, or a view."""
    outputs = graph.output_node().args[0]
    for node in outputs if isinstance(outputs, list | tuple) else (outputs,):
        while isinstance(node, fx.Node) and node.target is operator.getitem:
            node = node.args[0]
        target = node.target if isinstance(node, fx.Node) else None
        if not isinstance(target, torch._ops.OpOverload) or (
            target.namespace != "bonn_qat" and str(target) not in _NEW
        ):
            return False
    return True


def takes_planes(graph: fx.Graph) -> bool:
    """Whether the network takes images in ``torch.contiguous_format`` instead of ``torch.channels_last``."""
    return bool(graph.find_nodes(op="call_function", target=torch.ops.bonn_qat.max_pool2d.default))


def image_layout(graph: fx.Graph) -> torch.memory_format:
    """The memory format in which the network takes images."""
    return torch.contiguous_format if takes_planes(graph) else torch.channels_last


def laid_out(graph: fx.Graph, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` by name, the kernels of float convolutions in ``torch.channels_last``.

    The images have this format, and a convolution would convert its kernels to it in each call.
    """
    planes = takes_planes(graph)
    kernels = {
        node.args[1].target
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.conv2d.default)
        if len(node.args) > 1 and isinstance(node.args[1], fx.Node)
        and not (planes and isinstance(node.args[0], fx.Node) and node.args[0].op == "placeholder")
    }  # fmt: skip
    return {
        name: tensor.contiguous(memory_format=torch.channels_last) if name in kernels and tensor.ndim == 4 else tensor
        for name, tensor in tensors.items()
    }


def module(graph: fx.Graph, tensors: Mapping[str, Tensor]) -> tuple[fx.GraphModule, dict[str, str]]:
    """``graph`` as a module whose buffers are ``tensors``, and the names of these buffers, which have no dots."""
    root = nn.Module()
    names = {name: f"t{i}_{''.join(c if c.isalnum() else '_' for c in name)}" for i, name in enumerate(tensors)}
    for name, tensor in laid_out(graph, tensors).items():
        root.register_buffer(names[name], tensor)
    copy = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        values[node] = copy.node_copy(node, values.__getitem__)
        if node.op == "get_attr":
            values[node].target = names[node.target]
    return _forgotten(fx.GraphModule(root, copy, "PackedGraph")), names


def _forgotten(network: fx.GraphModule) -> fx.GraphModule:
    """Return ``network``; torch.fx drops its source with it, instead of keeping 5 KiB for each network forever."""
    sources = getattr(getattr(fx.graph_module, "_loader", None), "eval_cache", {})
    name = getattr(getattr(type(network).forward, "__code__", None), "co_filename", "")
    if name in sources:

        def forget() -> None:
            sources.pop(name, None)
            linecache.cache.pop(name, None)

        weakref.finalize(network, forget).atexit = False
    return network
