"""ONNX: signs as comparisons and weights as packed bits for onnxruntime; BipolarQuant nodes for QONNX."""

import copy
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast, final

import numpy as np
import torch
from torch import Tensor, nn

from bonn_qat.binarization.binarize import binary_layers
from bonn_qat.errors import InvalidModel
from bonn_qat.exporting.trace import in_batches, trace
from bonn_qat.inputs import Inputs
from bonn_qat.layers import BinaryLayer
from bonn_qat.packing.compare import compare
from bonn_qat.packing.ready import quiet, reason
from bonn_qat.quantizers import WeightQuantizer

if TYPE_CHECKING:
    import onnx_ir as ir

_OPSET = 18  # the first with BitwiseAnd
_BOOL, _UINT8 = 9, 2  # onnx.TensorProto
_QONNX = "qonnx.custom_op.general"
_MOVES = ("Reshape", "Unsqueeze", "Squeeze", "Flatten", "Identity")  # what changes a shape and no value


@final
class _Signs(WeightQuantizer):
    """For a weight that already is signs: these and the scale ``(O, 1, 1, 1)`` enter the graph as they are.

    There is one scale for each kernel, because a runtime moves a scalar into the product, where every sum would be
    rounded.
    """

    def __init__(self, scale: Tensor, kernels: int) -> None:
        super().__init__()
        self.scale: Tensor
        self.register_buffer("scale", scale.reshape(-1, 1, 1, 1).expand(kernels, 1, 1, 1).clone())

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, self.scale


class _Dialect(NamedTuple):
    """How to write the sign of a value, and a weight of two values in each filter: nodes, the last with the result.

    ``keeps_nan``: whether the maximum of a pool's window with NaN is made NaN, as torch's is.
    """

    sign: "Callable[[ir.Graph, ir.Value], list[ir.Node]]"
    weight: "Callable[[ir.Graph, ir.Value], list[ir.Node]]"
    keeps_nan: bool


def _onnx(model: nn.Module, inputs: Inputs, batch: int | None, dialect: _Dialect) -> bytes:
    import onnx_ir as ir
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass
    from onnxscript import optimizer

    binary = _release(model)
    program = trace(model, inputs, batch)
    names = inputs.names(program.graph_signature.user_inputs, program.call_spec.in_spec)
    try:
        with quiet(), warnings.catch_warnings():
            # Of several inputs, the first alone names the axis.
            warnings.filterwarnings("ignore", "# The axis name", UserWarning)
            converted: Any = torch.onnx.export(
                program, dynamo=True, optimize=False, verbose=False, opset_version=_OPSET, input_names=names,
                dynamic_shapes=inputs.dynamic_shapes(model, "batch") if program.range_constraints else None,
            )  # fmt: skip
    except Exception as error:  # whatever the converter raises
        raise InvalidModel(f"torch.onnx cannot convert {type(model).__name__}: {reason(error)}") from error
    graph: ir.Graph = converted.model.graph
    for node in list(graph):
        _shorten(node, binary)
        _rewrite_sign(graph, node, binary, dialect)
        if node.op_type == "MaxPool" and dialect.keeps_nan:
            _keep_nan(graph, node)
    optimizer.optimize(converted.model)
    for node in graph:
        _scale_first(node, binary)
    for name in sorted(binary & set(graph.initializers)):
        value = graph.initializers[name]
        _replace(graph, value, dialect.weight(graph, value), before=graph[0])
    ClearMetadataAndDocStringPass()(converted.model)  # stack traces contain paths of this machine
    content: bytes = ir.to_proto(converted.model).SerializeToString()
    return content


def _release(model: nn.Module) -> set[str]:
    """Turn frozen signs into float parameters; return the names of all weights with two values in each filter."""
    names = set()
    for name, layer in binary_layers(model):
        if layer.weight_quant.scaled_sign:
            _, scale = layer.weight_quant.quantize(layer.latent())
            layer.weight_quant = _Signs(scale, len(layer.kernels()))
            layer.weight = nn.Parameter(layer.weight.float(), requires_grad=False)
        filters = layer.weight.flatten(1)
        low, high = filters.aminmax(dim=1, keepdim=True)
        if ((filters == low) | (filters == high)).all():
            names.add(f"{name}.weight")
    return names


def _producer(value: "ir.Value | None", *operators: str) -> "ir.Node | None":
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type in operators else None


def _number(value: "ir.Value | None") -> float | None:
    """The constant that a value is, None for another."""
    from onnx_ir.convenience import get_const_tensor

    while (cast_ := _producer(value, "Cast", "Identity")) is not None:
        value = cast_.inputs[0]
    tensor = get_const_tensor(value) if value is not None else None
    return float(tensor.numpy()) if tensor is not None and tensor.size == 1 else None


def _shorten(node: "ir.Node", binary: set[str]) -> None:
    """Give ``node`` the weight itself instead of one that was reshaped and is back in its own shape."""
    for index, value in enumerate(node.inputs):
        source = value
        while (move := _producer(source, *_MOVES)) is not None:
            source = move.inputs[0]
        if value is not None and source is not None and source.name in binary and source.shape == value.shape:
            node.replace_input_with(index, source)


def _rewrite_sign(graph: "ir.Graph", node: "ir.Node", binary: set[str], dialect: _Dialect) -> None:
    """Rewrite a sign that ``node`` completes, traced as ``Sign(Cast(x >= 0) - 1/2)``; of signs it is x itself."""
    reached: ir.Node | None = node if node.op_type == "Sign" else None
    for operator, number in (("Sub", 0.5), ("Cast", None), ("GreaterOrEqual", 0)):
        reached = _producer(reached.inputs[0], operator) if reached is not None else None
        if reached is None or (number is not None and _number(reached.inputs[1]) != number):
            return
    assert reached is not None
    x: Any = reached.inputs[0]
    if (copied := _producer(x, "Identity")) is not None:
        x = copied.inputs[0]
    if x.name in binary:
        node.outputs[0].replace_all_uses_with(x)
    else:
        _replace(graph, node.outputs[0], dialect.sign(graph, x), before=node)


def _keep_nan(graph: "ir.Graph", pool: "ir.Node") -> None:
    """``Where(MaxPool(IsNaN(x)) > 0, NaN, MaxPool(x))``: ONNX leaves NaN open, and onnxruntime's maximum passes it."""
    import onnx_ir as ir

    where = _node("IsNaN", [cast("ir.Value", pool.inputs[0])])
    as_octets = _node("Cast", where.outputs, to=_UINT8)
    same = ir.node("MaxPool", as_octets.outputs, dict(pool.attributes))
    found = _node("Cast", same.outputs, to=_BOOL)
    kept = _node("Where", [*found.outputs, _constant(graph, "nan", np.float32(np.nan)), pool.outputs[0]])
    result, value = kept.outputs[0], pool.outputs[0]
    result.shape, result.dtype = value.shape, value.dtype  # type: ignore[assignment]
    graph.insert_after(pool, [where, as_octets, same, found, kept])
    for user, index in list(value.uses()):
        if user is not kept:
            user.replace_input_with(index, result)


def _scale_first(node: "ir.Node", binary: set[str]) -> None:
    """``product * scale -> scale * product``: onnxruntime would move a scale on the right into the weights."""
    product = _producer(node.inputs[0], "Conv", "Gemm", "MatMul") if node.op_type == "Mul" else None
    if product is not None and any(value is not None and value.name in binary for value in product.inputs):
        left, right = node.inputs
        node.replace_input_with(0, right)
        node.replace_input_with(1, left)


def _replace(graph: "ir.Graph", value: "ir.Value", nodes: "list[ir.Node]", *, before: "ir.Node") -> None:
    result = nodes[-1].outputs[0]
    result.shape, result.dtype = value.shape, value.dtype  # type: ignore[assignment]
    graph.insert_before(before, nodes)
    for user, index in list(value.uses()):
        if user not in nodes:
            user.replace_input_with(index, result)


def _node(operator: str, inputs: "Sequence[ir.Value]", to: int | None = None, domain: str = "") -> "ir.Node":
    import onnx_ir as ir

    return ir.node(operator, inputs, {} if to is None else {"to": to}, domain=domain)


def _constant(graph: "ir.Graph", name: str, array: Any) -> "ir.Value":
    import onnx_ir as ir

    name = f"bonn_qat.{name}"
    if name not in graph.initializers:
        graph.register_initializer(ir.val(name, const_value=ir.tensor(np.asarray(array), name=name)))
    return graph.initializers[name]


def _compare(graph: "ir.Graph", x: "ir.Value") -> "list[ir.Node]":
    """+1 where ``x >= 0``, else -1; onnxruntime takes a quarter of the time that it needs for Sign, Add and Sign."""
    zero, plus, minus = (_constant(graph, name, np.float32(x)) for name, x in (("zero", 0), ("plus", 1), ("minus", -1)))
    reached = _node("GreaterOrEqual", [x, zero])
    return [reached, _node("Where", [*reached.outputs, plus, minus])]


def _unpack(graph: "ir.Graph", weight: "ir.Value") -> "list[ir.Node]":
    """Bits in the place of ``weight``, eight in a byte, the first the lowest; a runtime unpacks them on loading."""
    assert weight.name is not None
    assert weight.const_value is not None
    values = weight.const_value.numpy()
    axes = tuple(range(1, values.ndim))
    low, high = values.min(axes, keepdims=True), values.max(axes, keepdims=True)
    if (abs(values) == 1).all():
        low, high = np.float32(-1), np.float32(1)
    packed = np.packbits((values == high).flatten(), bitorder="little")[:, None]
    nodes: list[ir.Node] = []

    def then(operator: str, *others: "tuple[str, Any]", to: int | None = None) -> None:
        inputs = [_constant(graph, name, array) for name, array in others]
        nodes.append(_node(operator, [*(nodes[-1].outputs if nodes else ()), *inputs], to=to))

    then("BitwiseAnd", (f"{weight.name}.bits", packed), ("places", 1 << np.arange(8, dtype=np.uint8)))
    then("Cast", to=_BOOL)
    if values.size % 8:
        then("Reshape", ("flat", np.array([-1])))
        then("Slice", ("start", np.array([0])), (f"{weight.name}.size", np.array([values.size])))
    then("Reshape", (f"{weight.name}.shape", np.array(values.shape)))
    kind = f"{weight.name}." if high.ndim else ""
    then("Where", (f"{kind}plus", high), (f"{kind}minus", low))
    del graph.initializers[weight.name]
    return nodes


def _bipolar(graph: "ir.Graph", x: "ir.Value") -> "list[ir.Node]":
    """``BipolarQuant`` with a scale of 1, which is what qonnx counts as one bit."""
    graph.opset_imports[_QONNX] = 1
    return [_node("BipolarQuant", [x, _constant(graph, "plus", np.float32(1))], domain=_QONNX)]


def write_onnx(model: nn.Module, inputs: Inputs) -> bytes:
    """The bytes of an ONNX file that keeps one bit for each binary weight.

    If onnxruntime is installed, it computes with them as the model does.
    """
    content = _onnx(model, inputs, None, _Dialect(sign=_compare, weight=_unpack, keeps_nan=True))
    if importlib.util.find_spec("onnxruntime"):
        is_exact = all(beyond_bipolar(layer) is None for _, layer in binary_layers(model))

        def run(*args: Tensor, **kwargs: Tensor) -> list[Tensor]:
            return run_onnx(content, Inputs(args=args, kwargs=kwargs))

        compare(model, run, inputs, f"onnxruntime does not compute {type(model).__name__}", is_exact=is_exact)
    return content


def run_onnx(source: Path | bytes, inputs: Tensor | Inputs) -> list[Tensor]:
    """The outputs of an ONNX file, or of its bytes, in onnxruntime, on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    given = session.get_inputs()

    def run(part: Inputs) -> list[Tensor]:
        named = part.named([each.name for each in given])
        return [torch.from_numpy(x) for x in session.run(None, {name: x.numpy() for name, x in named.items()})]

    return in_batches(run, inputs, given[0].shape[0] if isinstance(given[0].shape[0], int) else None)


def write_qonnx(model: nn.Module, inputs: Inputs) -> bytes:
    """The bytes of a QONNX file, with BipolarQuant nodes, for one image."""
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.util.cleanup import cleanup_model

    dialect = _Dialect(sign=_bipolar, weight=_bipolar, keeps_nan=False)
    raw = _onnx(model, inputs, 1, dialect)  # qonnx needs every shape, so for one image
    content: bytes = cleanup_model(ModelWrapper(raw)).model.SerializeToString()
    return content


def run_qonnx(path: Path, inputs: Tensor | Inputs) -> list[Tensor]:
    """The outputs of a QONNX file in qonnx's own interpreter, image by image."""
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.core.onnx_exec import execute_onnx

    model = ModelWrapper(str(path))
    given, outputs = [each.name for each in model.graph.input], model.graph.output

    def run(one: Inputs) -> list[Tensor]:
        result = execute_onnx(model, {name: x.numpy() for name, x in one.named(given).items()})
        return [torch.from_numpy(result[output.name]) for output in outputs]

    return in_batches(run, inputs, 1)


def beyond_bipolar(layer: BinaryLayer) -> str | None:
    """Why a layer is not a product of -1 and +1, or of floats with -1 and +1; None if it is."""
    if not layer.weight_quant.scaled_sign:
        return "its weights are not a scale times a sign"
    if layer.input_quant is None:
        return None
    inputs = torch.randn(16, getattr(layer, layer.channels[0]), 4, 4, generator=torch.Generator().manual_seed(0))
    quantizer = copy.deepcopy(layer.input_quant).cpu().float().eval()
    with torch.no_grad():
        value, _ = quantizer.quantize(inputs)
    return None if (value.abs() == 1).all() else "its inputs are not -1 and +1"
