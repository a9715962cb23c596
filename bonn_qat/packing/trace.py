"""Trace: a model in evaluation mode -> its graph, which needs neither the model's class nor the library it is from."""

import contextlib
import linecache
from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import OutputKind
from torch.overrides import TorchFunctionMode

from bonn_qat.errors import InvalidModel
from bonn_qat.inputs import Inputs
from bonn_qat.packing.network import Network, Value
from bonn_qat.packing.ready import quiet, reason
from bonn_qat.runtime.layout import Geometry
from bonn_qat.runtime.packed import Input

aten = torch.ops.aten
_COMPARISONS = {
    getattr(getattr(aten, name), overload)
    for name in ("eq", "ge", "gt", "le", "lt", "ne", "logical_not", "logical_and", "logical_or", "logical_xor")
    for overload in getattr(aten, name).overloads() if overload in ("Scalar", "Tensor", "default")
}  # fmt: skip
_PROMOTING = ("add", "div", "mul", "pow", "rsub", "sub", "true_divide")  # whole numbers to floats
_SAME = {getattr(aten, f"__{name}__").Tensor: getattr(aten, f"bitwise_{name}").Tensor for name in ("and", "or", "xor")}
_DROPOUT = (aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default)


def trace(model: nn.Module, inputs: Inputs) -> Network:
    """The graph of ``model`` for ``inputs``, by ``torch.export``.

    The batch is free, unless the model's own code fixes it: then the graph is one for a single image.

    Raises InvalidModel for a model that torch cannot export, that calls what a packed network may not, or that returns
    anything but tensors.
    """
    with _releasing_exports() as programs:
        program, batch = _export(model, inputs)
        programs.append(program)
        network = _plain_network(program, batch)
        if network is None or network.unknown_calls():
            with torch.no_grad():
                # Three times as slow as the export. It handles values that are changed in place, and torch.no_grad().
                program = program.run_decompositions({})
            network = _decomposed_network(program, batch)
    network.inputs = _inputs(network.graph, inputs, program.call_spec.in_spec)
    if unknown := network.unknown_calls():
        raise InvalidModel(
            f"{type(model).__name__} calls {', '.join(unknown)}, which a packed network cannot call; "
            "export(model, path, 'pt2') or 'onnx' writes it, or pack a part without such calls"
        )
    return network


def _export(model: nn.Module, inputs: Inputs) -> tuple[Any, int | None]:
    """The exported program, and the batch that it is bound to, None for any."""
    two = inputs.drawn(2, seed=0).map(lambda x: x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x)
    shapes = inputs.dynamic_shapes(model, torch.export.Dim("batch", min=1))
    # Whatever torch raises for a model that fixes its batch.
    with contextlib.suppress(Exception), quiet(), _AnyLayout():
        return torch.export.export(model, two.args, two.kwargs, dynamic_shapes=shapes), None
    try:
        with quiet(), _AnyLayout():
            one, _ = two.split(1)
            return torch.export.export(model, one.args, one.kwargs), 1
    except Exception as error:  # whatever torch raises
        raise InvalidModel(
            f"torch.export does not take this {type(model).__name__}, so it cannot be packed: {reason(error)}"
        ) from error


class _AnyLayout(TorchFunctionMode):
    """Views of maps in another layout than the model's code expects are copies."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.view and not any(isinstance(x, torch.dtype) for x in (*args, *(kwargs or {}).values())):
            func = Tensor.reshape
        return func(*args, **(kwargs or {}))


def _plain_network(program: Any, batch: int | None) -> Network | None:
    """The network of an export before decompositions; None where that cannot tell which values change in place."""
    return None if _subgraphs(program) else _network(program, batch, _out_of_place)


def _decomposed_network(program: Any, batch: int | None) -> Network:
    if parts := _subgraphs(program):
        raise InvalidModel(
            f"torch.export leaves {parts[0]} a graph of its own, as for code under torch.autocast, which a packed "
            "network does not hold"
        )
    return cast(Network, _network(program, batch, _restore_norms))


def _subgraphs(program: Any) -> list[str]:
    """The parts of a program that are graphs of their own, as those under ``torch.no_grad`` or ``torch.autocast``."""
    held = {**program.state_dict, **program.constants}
    return [node.target for node in program.graph.find_nodes(op="get_attr") if node.target not in held]


def _network(program: Any, batch: int | None, normalize: Callable[[fx.Graph], bool]) -> Network | None:
    """The graph with its tensors as nodes, for the images alone; None where ``normalize(graph)`` is False."""
    signature = program.graph_signature
    held = {**program.state_dict, **program.constants}
    sources = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    graph, tensors = fx.Graph(), dict[str, Tensor]()
    copies: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in sources:
            name = sources[node.name]
            tensors[name] = held[name].detach()
            copies[node] = graph.create_node("get_attr", name)
        elif not _is_check(node):
            copies[node] = graph.node_copy(node, copies.__getitem__)
            copies[node].target = _SAME.get(node.target, node.target)
        if node in copies:
            copies[node].meta = _facts(node)
    _drop_changes(graph, signature.output_specs)
    if not normalize(graph):
        return None
    _name_types(graph)
    network = Network(graph, tensors, {}, batch)
    network.outputs = _shape_output(graph, program.call_spec.out_spec)
    for node in network.calls(torch.ops.bonn_qat.binary_conv2d.default):
        network.weights[node.args[1].target] = Geometry.of(list(node.args[2]))  # type: ignore[arg-type, index, union-attr]
    network.simplify()
    return network


def _is_check(node: fx.Node) -> bool:
    """Whether ``node`` only checks something, as an export does."""
    is_guard = node.op == "call_function" and not node.users and not isinstance(node.target, torch._ops.OpOverload)
    return is_guard or node.target is aten._assert_tensor_metadata.default


def _facts(node: fx.Node) -> dict[str, Any]:
    """What is kept of a node's ``meta``: nothing that refers to the export, which would live as long as the network."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return {}
    return {"val": Value(tuple(n if isinstance(n, int) else str(n) for n in value.shape), value.dtype)}


def _out_of_place(graph: fx.Graph) -> bool:
    """Replace operations in place on values that nothing else reads; False if there are others."""
    for node in list(graph.nodes):
        target: Any = node.target
        if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
            continue
        if target in _DROPOUT and node.args[2] is False:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif target._schema.is_mutable:
            source, plain = node.args[0], getattr(aten, target._opname.removesuffix("_"), None)
            function = getattr(plain, target._overloadname, None)
            if function is None or not isinstance(source, fx.Node) or len(source.users) != 1 or not _is_fresh(source):
                return False
            node.target = function
            if function in _COMPARISONS:  # in place they keep the type
                with graph.inserting_after(node):
                    kept = graph.call_function(aten._to_copy.default, (node,), {"dtype": node.meta["val"].dtype})
                kept.meta = dict(node.meta)
                node.meta["val"] = node.meta["val"]._replace(dtype=torch.bool)
                node.replace_all_uses_with(kept, lambda user, kept=kept: user is not kept)
    return True


def _name_types(graph: fx.Graph) -> None:
    """Write float32 where it would come from torch's default type, which may be another one in a later call."""
    for node in list(graph.nodes):
        target: Any = node.target
        kinds = [each.meta["val"].dtype for each in (node, *node.all_input_nodes) if "val" in each.meta]
        if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload) or "val" not in node.meta:
            continue
        if kinds[0] != torch.float32 or any(kind.is_floating_point for kind in kinds[1:]):
            continue
        if any(argument.name == "dtype" and argument.kwarg_only for argument in target._schema.arguments):
            node.kwargs = {**node.kwargs, "dtype": torch.float32}
        elif target._opname in _PROMOTING:
            for source in node.all_input_nodes:
                with graph.inserting_before(node):
                    made = graph.call_function(aten._to_copy.default, (source,), {"dtype": torch.float32})
                made.meta = {"val": source.meta["val"]._replace(dtype=torch.float32)} if "val" in source.meta else {}
                node.replace_input_with(source, made)


def _is_fresh(node: fx.Node) -> bool:
    """Whether a value shares its memory with no other."""
    target: Any = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return False
    return all(result.alias_info is None for result in target._schema.returns)


def _restore_norms(graph: fx.Graph) -> bool:
    """Write batch norms as the export before decompositions has them."""
    for node in list(graph.find_nodes(op="call_function", target=aten._native_batch_norm_legit_no_training.default)):
        results = list(node.users)
        if len(results) != 1 or results[0].args[1] != 0:
            continue
        result = results[0]
        source, weight, bias, mean, variance, momentum, eps = node.args
        with graph.inserting_before(node):
            args = (source, weight, bias, mean, variance, False, momentum, eps, False)
            norm = graph.call_function(aten.batch_norm.default, args)
        norm.meta = dict(result.meta)
        result.replace_all_uses_with(norm)
        graph.erase_node(result)
        graph.erase_node(node)
    return True


def _drop_changes(graph: fx.Graph, specs: Sequence[Any]) -> None:
    """Leave the model's own outputs: after decompositions, tensors that it changes in place come before them."""
    node = graph.output_node()
    for spec in specs:
        if spec.kind == OutputKind.BUFFER_MUTATION:
            raise InvalidModel(
                f"the model changes its buffer {spec.target} in each call, which a packed network cannot"
            )
    outputs = cast(tuple[Any, ...], node.args[0])
    node.args = (tuple(x for x, spec in zip(outputs, specs, strict=True) if spec.kind == OutputKind.USER_OUTPUT),)


def _inputs(graph: fx.Graph, inputs: Inputs, spec: Any) -> tuple[Input, ...]:
    """What the graph takes."""
    places = graph.find_nodes(op="placeholder")
    names = inputs.names([place.name for place in places], spec)
    values = [place.meta["val"] for place in places]
    return tuple(
        Input(name=name, size=value.shape[1:], type=str(value.dtype).removeprefix("torch."))
        for name, value in zip(names, values, strict=True)
    )


def _shape_output(graph: fx.Graph, spec: Any) -> tuple[str, ...]:
    """Let the graph return what the model returns: a tensor, or a list or tuple of tensors; of a dict its names."""
    node = graph.output_node()
    outputs = cast(tuple[Any, ...], node.args[0])
    if spec.is_leaf():
        node.args = (outputs[0],)
        return ()
    kind = tuple if spec.type is namedtuple else spec.type
    is_flat = all(child.is_leaf() for child in spec.children()) and all(isinstance(x, fx.Node) for x in outputs)
    if is_flat and issubclass(kind, dict) and outputs and all(isinstance(key, str) for key in spec.context):
        return tuple(spec.context)
    if not is_flat or not issubclass(kind, list | tuple):
        raise InvalidModel(
            "a packed network returns a tensor, or a list, tuple or dict of tensors; this one returns "
            f"{_form(spec, iter(outputs))}; pack a part of it, as in model.backbone = pack(model.backbone, size)"
        )
    return ()


def _form(spec: Any, outputs: Iterator[Any]) -> str:
    """The form of what a model returns, as in ``list[dict[tensor]]``."""
    if spec.is_leaf():
        return "tensor" if isinstance(output := next(outputs), fx.Node) else str(output)
    parts = dict.fromkeys(_form(child, outputs) for child in spec.children())
    return f"{spec.type.__name__}[{', '.join(parts)}]"


@contextlib.contextmanager
def _releasing_exports() -> Iterator[list[Any]]:
    """After the block torch keeps nothing of the programs in the list; without this it keeps more with each export.

    It would keep the shapes that it found, by symbols that no later graph has, and the source of each module that an
    export makes on its way. In a version of torch without these places nothing is done.
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
        for name in ("tracked_fakes", "fake_tensor_cache"):  # a reference cycle that the collector does not see
            held: Any = getattr(shapes, name, None)
            if hasattr(held, "clear"):
                held.clear()
