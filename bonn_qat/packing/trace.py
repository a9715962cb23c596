"""Capture: a model whose binary layers call the runtime's operators -> its graph, which stands on its own."""

import contextlib
import linecache
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from bonn_qat.errors import InvalidModel
from bonn_qat.packing.fuse import Network, fuse
from bonn_qat.runtime import graph as graphs
from bonn_qat.runtime.layout import Geometry

aten = torch.ops.aten
_DROPOUT = (aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default)


def capture(model: nn.Module, size: tuple[int, ...]) -> tuple[Network, int | None]:
    """The fused graph of ``model`` for images of ``size``, and the batch that it is bound to, None for any.

    Raises InvalidModel for a model that torch cannot export, that calls what a packed network does not, or that gives
    other than tensors.
    """
    with _leaving_nothing() as programs:
        program, batch = _export(model, size)
        programs.append(program)
        network = _network(program, is_functional=False)
        if network is None or _unknown(network):
            with torch.no_grad():
                # Three times as slow as the export; needed where values are changed in place, or below torch.no_grad.
                program = program.run_decompositions({})
            network = _network(program, is_functional=True)
    assert network is not None
    if unknown := _unknown(network):
        raise InvalidModel(f"a packed network does not call {', '.join(unknown)}, as {type(model).__name__} does")
    return network, batch


@contextlib.contextmanager
def _leaving_nothing() -> Iterator[list[Any]]:
    """Within the block torch keeps nothing of the programs in the list for longer; else it grows with each export.

    It would keep the shapes that it has found, by symbols that no later graph has, and the source of each module that
    an export makes on its way. Where a version of torch has these places no more, nothing is done.
    """
    from torch._dynamo import config  # imported with torch.export, and slow to import
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    sources = getattr(getattr(fx.graph_module, "_loader", None), "eval_cache", {})
    before, programs = set(sources), list[Any]()
    with config.patch(fake_tensor_cache_enabled=False):
        yield programs
    for name in sources.keys() - before:
        sources.pop(name)
        linecache.cache.pop(name, None)
    for method in vars(ShapeEnv).values():
        if hasattr(method, "cache_clear"):
            method.cache_clear()
    values = (node.meta.get("val") for program in programs for node in program.graph.nodes)
    for shapes in {getattr(getattr(value, "fake_mode", None), "shape_env", None) for value in values}:
        for name in ("tracked_fakes", "fake_tensor_cache"):  # a cycle that no collector sees goes through them
            held: Any = getattr(shapes, name, None)
            if hasattr(held, "clear"):
                held.clear()


def _export(model: nn.Module, size: tuple[int, ...]) -> tuple[Any, int | None]:
    images = torch.zeros(2, *size).contiguous(memory_format=torch.channels_last)
    try:
        return torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)), None
    except Exception:  # whatever torch raises for a model that fixes its batch
        pass
    try:
        return torch.export.export(model, (images[:1],)), 1
    except Exception as error:  # whatever torch raises
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InvalidModel(
            f"torch.export does not take this {type(model).__name__}, so it cannot be packed: {reason}"
        ) from error


def _network(program: Any, is_functional: bool) -> Network | None:
    """None where values are changed in place and it is not plain which."""
    signature = program.graph_signature
    held = {**program.state_dict, **program.constants}
    sources = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    parts = [node.target for node in program.graph.find_nodes(op="get_attr") if node.target not in held]
    if parts and not is_functional:
        return None
    if parts:
        raise InvalidModel(
            f"torch.export leaves {parts[0]} a graph of its own, as for a part under torch.autocast, which a packed "
            "network does not hold"
        )
    graph, tensors, weights = fx.Graph(), dict[str, Tensor](), dict[str, Geometry]()  # a graph that no module owns
    copies: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    for node in list(graph.nodes):
        if node.op == "placeholder" and node.name in sources:
            name = sources[node.name]
            tensors[name] = held[name].detach()
            with graph.inserting_before(node):
                new = graph.create_node("get_attr", name)
            new.meta = dict(node.meta)
            node.replace_all_uses_with(new)
            graph.erase_node(node)
        elif node.target is aten._assert_tensor_metadata.default or _is_check(node):
            graph.erase_node(node)
    if not (_one_norm(graph) if is_functional else _out_of_place(graph)):
        return None
    for node in graph.find_nodes(op="call_function", target=torch.ops.bonn_qat.binary_conv2d.default):
        weights[node.args[1].target] = Geometry.of(list(node.args[2]))
    _shape_output(graph, program.call_spec.out_spec)
    network = Network(graph, tensors, weights)
    fuse(network)
    return network


def _is_check(node: fx.Node) -> bool:
    """Whether a call of no operator gives nothing that is used, as the checks of an export."""
    return node.op == "call_function" and not node.users and not isinstance(node.target, torch._ops.OpOverload)


def _out_of_place(graph: fx.Graph) -> bool:
    """Replace operations in place on values that nothing else sees; False if there are others."""
    for node in list(graph.nodes):
        target: Any = node.target
        if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
            continue
        if target in _DROPOUT and node.args[2] is False:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif target._schema.is_mutable:
            source, plain = node.args[0], getattr(aten, target._opname.removesuffix("_"), None)
            if not isinstance(source, fx.Node) or len(source.users) != 1 or not _is_fresh(source) or plain is None:
                return False
            function = getattr(plain, target._overloadname, None)
            if function is None:
                return False
            node.target = function
    return True


def _is_fresh(node: fx.Node) -> bool:
    """Whether a value shares its memory with no other."""
    target: Any = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return False
    return all(result.alias_info is None for result in target._schema.returns)


def _one_norm(graph: fx.Graph) -> bool:
    """Write batch norms as the export before decompositions has them."""
    for node in list(graph.find_nodes(op="call_function", target=aten._native_batch_norm_legit_no_training.default)):
        used = list(node.users)
        if len(used) == 1 and used[0].args[1] == 0:
            source, weight, bias, mean, variance, momentum, eps = node.args
            with graph.inserting_before(node):
                args = (source, weight, bias, mean, variance, False, momentum, eps, False)
                new = graph.call_function(aten.batch_norm.default, args)
            new.meta = dict(used[0].meta)
            used[0].replace_all_uses_with(new)
            graph.erase_node(used[0])
            graph.erase_node(node)
    return True


def _unknown(network: Network) -> list[str]:
    functions = {node.target for node in network.graph.nodes if node.op == "call_function"}
    return sorted(graphs.name_of(function) for function in functions if not graphs.is_known(function))


def _shape_output(graph: fx.Graph, spec: Any) -> None:
    """Let the graph return what the model returns: a tensor, or a list or tuple of tensors."""
    node = graph.output_node()
    outputs = cast(tuple[Any, ...], node.args[0])
    if spec.is_leaf():
        node.args = (outputs[0],)
    elif spec.type not in (list, tuple) or not all(child.is_leaf() for child in spec.children()):
        raise InvalidModel(f"a packed network gives a tensor, or a list or tuple of tensors; this one gives {spec}")
