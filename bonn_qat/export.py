"""export: a binary network as one file for another runtime; ``FORMATS`` says which there are.

What is written computes in float32, on images ``(B, C, H, W)``, what the model does in evaluation mode. The product of
signs stays one of its own, its scale comes after, so that its sums are the exact integers in every runtime; ``sign(0)``
is +1. Sums of floats are rounded in another order elsewhere: where one is the input of a sign and within its rounding
of the threshold, the sign may be another one.
"""

import copy
import importlib.util
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, final

import numpy as np
import torch
from torch import Tensor, nn

from bonn_qat.binarize import Binarization, binary_layers
from bonn_qat.c_header import c_header
from bonn_qat.errors import BonnQatError, InvalidModel, UnknownName
from bonn_qat.files import write_whole
from bonn_qat.layers import BinaryLayer
from bonn_qat.modes import modes
from bonn_qat.pack import pack
from bonn_qat.packed import PackedModel
from bonn_qat.quantizers import WeightQuantizer
from bonn_qat.summary import input_size_of

if TYPE_CHECKING:
    import onnx_ir as ir

_SEED = 0  # of the random images and inputs
_OPSET = 18  # the first with BitwiseAnd
_BOOL = 9  # onnx.TensorProto.BOOL
_QONNX = "qonnx.custom_op.general"
_MOVES = ("Reshape", "Unsqueeze", "Squeeze", "Flatten", "Identity")  # what changes a shape and no value


class PackageMissing(BonnQatError, ImportError):
    """A format is asked for, and what writes or runs it is not installed."""


class Format(NamedTuple):
    """A format: ``write(model, size)`` makes the file of a frozen copy, ``run(path, images)`` runs it elsewhere.

    The copy is in evaluation mode, on the CPU, in float32, and ``write``'s own; ``size`` is ``(C, H, W)``. ``run``
    gives a tensor for each output; it is None for what a compiler takes. ``needs`` are the packages that ``write``
    imports, ``runs_in`` those of ``run``. ``refuses`` says what the format cannot hold of a layer, None if it can.
    """

    write: Callable[[nn.Module, tuple[int, ...]], bytes]
    run: Callable[[Path, Tensor], list[Tensor]] | None
    needs: tuple[str, ...] = ()
    runs_in: tuple[str, ...] = ()
    refuses: Callable[[BinaryLayer], str | None] = lambda layer: None


class Agreement(NamedTuple):
    """How far a file's outputs are from the model's, and the share (0 to 1) of images that get the same class.

    ``difference`` is the largest of all, ``median`` that of the images' largest: far below it where a few images have
    another sign somewhere.
    """

    difference: float
    median: float
    same: float


def export(model: nn.Module, path: Path, format: str, *, input_size: Sequence[int] | None = None) -> Path:
    """Write a binarized ``model`` to ``path``, whole or not at all; the model stays as it is.

    ``format`` is a key of :data:`FORMATS`. ``input_size`` ``(C, H, W)`` is by default what the model was binarized for,
    else timm's. The file takes batches of any size where the format and the model's own code allow it, else of one.

    Raises UnknownName for another format; PackageMissing; InvalidModel for a model that is not binarized, that torch
    cannot trace, or with a layer that the format cannot hold, or that a stage of the training left float; OSError where
    the system refuses to write.
    """
    chosen = _find(format)
    _require(format, chosen.needs)
    size = input_size_of(model, input_size)
    _check(model, format)
    frozen = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
    for _, layer in binary_layers(frozen):
        layer.freeze()
    return write_whole(path, chosen.write(frozen, size))


def verify(
    model: nn.Module, path: Path, format: str, *, input_size: Sequence[int] | None = None, images: int = 8
) -> Agreement:
    """Run ``model``, and its file in the format's own runtime, on the same ``images`` of normal random numbers.

    Raises UnknownName for another format, PackageMissing where its runtime is not installed.
    """
    chosen = _find(format)
    _require(format, chosen.runs_in)
    if chosen.run is None:
        raise PackageMissing(f"the format {format!r} has no runtime of its own; what is made of the file runs it")
    batch = torch.randn(images, *input_size_of(model, input_size), generator=torch.Generator().manual_seed(_SEED))
    reference = next((p for p in model.parameters() if p.is_floating_point()), batch)
    with modes(model), torch.no_grad():
        ours = [output.cpu().float() for output in _outputs(model(batch.to(reference)))]
    theirs = chosen.run(path, batch)
    errors = [(own - other).abs().flatten(1).amax(1) for own, other in zip(ours, theirs, strict=True)]
    differences, same = torch.stack(errors).amax(0), ours[-1].argmax(1) == theirs[-1].argmax(1)
    return Agreement(float(differences.max()), float(differences.median()), float(same.float().mean()))


def _find(format: str) -> Format:
    if format not in FORMATS:
        raise UnknownName("format", format, FORMATS)
    return FORMATS[format]


def _require(format: str, packages: Sequence[str]) -> None:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise PackageMissing(f"the format {format!r} needs {' and '.join(missing)}: pip install 'bonn-qat[export]'")


def _check(model: nn.Module, format: str) -> None:
    layers, record = dict(binary_layers(model)), getattr(model, "binarization", None)
    if not layers and not isinstance(record, Binarization):
        raise InvalidModel(
            f"{type(model).__name__} is not binarized; export(binarize(model), ...), or for Brevitas' layers "
            "export(bonn_qat.adapters.brevitas.from_brevitas(model), ...)"
        )
    for name, layer in layers.items():
        if not layer.binary_weight or layer.stand_in is not None:
            raise InvalidModel(
                f"{name} is in a stage of the training that leaves something float; "
                "layer.enter(bonn_qat.Stage()) makes it binary"
            )
        reason = FORMATS[format].refuses(layer)
        if reason is not None:
            scheme = record.schemes.get(name, record.scheme).name if isinstance(record, Binarization) else "unknown"
            others = [repr(other) for other, known in FORMATS.items() if known.refuses(layer) is None]
            raise InvalidModel(
                f"the format {format!r} cannot hold {name}, of the scheme {scheme!r}: {reason}; "
                f"{', '.join(others)} can, and skip={name!r} in binarize leaves it float"
            )


def _outputs(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def _in_batches(run: Callable[[Tensor], list[Tensor]], images: Tensor, batch: int | None) -> list[Tensor]:
    """``run`` on parts of ``batch`` images, None for all at once; the outputs of all."""
    parts = [run(part) for part in torch.split(images, batch or len(images))]
    return [torch.cat(outputs) for outputs in zip(*parts, strict=True)]


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


# ------------------------------------------------------------------------------------------------------ torch.export


def _trace(model: nn.Module, size: tuple[int, ...], batch: int | None = None) -> torch.export.ExportedProgram:
    """``model`` as a graph for ``batch`` images; None is any number, or one where the model's code fixes the number."""
    images = torch.zeros(batch or 2, *size)
    shapes = None if batch else ({0: torch.export.Dim("batch")},)
    try:
        with torch.no_grad():
            return torch.export.export(model, (images,), dynamic_shapes=shapes)
    except Exception as error:  # whatever torch and a model's code raise
        if batch is None:
            return _trace(model, size, 1)
        raise InvalidModel(
            f"torch.export cannot trace {type(model).__name__} for an image of {size}: {_first_line(error)}"
        ) from error


def _write_pt2(model: nn.Module, size: tuple[int, ...]) -> bytes:
    program = _trace(model, size)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # this machine's paths, once for each node
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def _run_pt2(path: Path, images: Tensor) -> list[Tensor]:
    program = torch.export.load(io.BytesIO(path.read_bytes()))  # of a path it wants a certain ending
    module = program.module()
    with torch.no_grad():
        return _in_batches(lambda part: _outputs(module(part)), images, None if program.range_constraints else 1)


# -------------------------------------------------------------------------------------------------------------- ONNX


@final
class _Signs(WeightQuantizer):
    """Of a weight that is signs already: they and the scale ``(O, 1, 1, 1)`` enter the graph as they are.

    One scale for each kernel, because a runtime takes a scalar into the product, where it is rounded with every sum.
    """

    def __init__(self, scale: Tensor, kernels: int) -> None:
        super().__init__()
        self.scale: Tensor
        self.register_buffer("scale", scale.reshape(-1, 1, 1, 1).expand(kernels, 1, 1, 1).clone())

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, self.scale


class _Dialect(NamedTuple):
    """The nodes, the last with the result, for the sign of a value, and for a weight of two values in each filter."""

    sign: "Callable[[ir.Graph, ir.Value], list[ir.Node]]"
    weight: "Callable[[ir.Graph, ir.Value], list[ir.Node]]"


def _onnx(model: nn.Module, size: tuple[int, ...], batch: int | None, dialect: _Dialect) -> bytes:
    import onnx_ir as ir
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass
    from onnxscript import optimizer

    binary = _release(model)
    program = _trace(model, size, batch)
    try:
        converted: Any = torch.onnx.export(
            program, dynamo=True, optimize=False, verbose=False, opset_version=_OPSET, input_names=["images"],
            dynamic_shapes=({0: "batch"},) if program.range_constraints else None,
        )  # fmt: skip
    except Exception as error:  # whatever the converter raises
        raise InvalidModel(f"torch.onnx cannot convert {type(model).__name__}: {_first_line(error)}") from error
    graph: ir.Graph = converted.model.graph
    for node in list(graph):
        _shorten(node, binary)
        _rewrite_sign(graph, node, binary, dialect)
    optimizer.optimize(converted.model)
    for node in graph:
        _scale_first(node, binary)
    for name in sorted(binary & set(graph.initializers)):
        value = graph.initializers[name]
        _replace(graph, value, dialect.weight(graph, value), before=graph[0])
    ClearMetadataAndDocStringPass()(converted.model)  # stack traces with this machine's paths
    content: bytes = ir.to_proto(converted.model).SerializeToString()
    return content


def _release(model: nn.Module) -> set[str]:
    """Make frozen signs float parameters; the names of all weights that have two values in each filter."""
    names = set()
    for name, layer in binary_layers(model):
        if layer.weight_quant.scaled_sign:
            _, scale = layer.weight_quant.quantize(layer.latent())
            layer.weight_quant = _Signs(scale, len(layer.weight))
            layer.weight = nn.Parameter(layer.weight.float(), requires_grad=False)
        filters = layer.weight.flatten(1)
        low, high = filters.aminmax(dim=1, keepdim=True)
        if ((filters == low) | (filters == high)).all():
            names.add(f"{name}.weight")
    return names


def _producer(value: "ir.Value | None", *operators: str) -> "ir.Node | None":
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type in operators else None


def _shorten(node: "ir.Node", binary: set[str]) -> None:
    """Give ``node`` a weight itself where it gets one that was reshaped, to its own shape in the end."""
    for index, value in enumerate(node.inputs):
        source = value
        while (move := _producer(source, *_MOVES)) is not None:
            source = move.inputs[0]
        if value is not None and source is not None and source.name in binary and source.shape == value.shape:
            node.replace_input_with(index, source)


def _rewrite_sign(graph: "ir.Graph", node: "ir.Node", binary: set[str], dialect: _Dialect) -> None:
    """Rewrite ``node`` if it ends a sign, which is traced as ``Sign(Sign(x) + 1/2)``; the sign of signs is these."""
    add = _producer(node.inputs[0], "Add") if node.op_type == "Sign" else None
    first = _producer(add.inputs[0], "Sign") if add is not None else None
    if first is None:
        return
    x: Any = first.inputs[0]
    if x.name in binary:
        node.outputs[0].replace_all_uses_with(x)
    else:
        _replace(graph, node.outputs[0], dialect.sign(graph, x), before=node)


def _scale_first(node: "ir.Node", binary: set[str]) -> None:
    """Turn ``product * scale`` round: onnxruntime would take a scale on the right into the weights."""
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
    """+1 where ``x >= 0``, else -1: in onnxruntime a quarter of the time of Sign, Add and Sign."""
    zero, plus, minus = (_constant(graph, name, np.float32(x)) for name, x in (("zero", 0), ("plus", 1), ("minus", -1)))
    reached = _node("GreaterOrEqual", [x, zero])
    return [reached, _node("Where", [*reached.outputs, plus, minus])]


def _unpack(graph: "ir.Graph", weight: "ir.Value") -> "list[ir.Node]":
    """Bits in the place of ``weight``, eight to a byte, the first the lowest; a runtime unpacks them when it loads."""
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


def _write_onnx(model: nn.Module, size: tuple[int, ...]) -> bytes:
    return _onnx(model, size, None, _Dialect(sign=_compare, weight=_unpack))


def _run_onnx(path: Path, images: Tensor) -> list[Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()

    def run(part: Tensor) -> list[Tensor]:
        return [torch.from_numpy(output) for output in session.run(None, {given.name: part.numpy()})]

    return _in_batches(run, images, given.shape[0] if isinstance(given.shape[0], int) else None)


def _write_qonnx(model: nn.Module, size: tuple[int, ...]) -> bytes:
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.util.cleanup import cleanup_model

    raw = _onnx(model, size, 1, _Dialect(sign=_bipolar, weight=_bipolar))  # of one image, for qonnx wants every shape
    content: bytes = cleanup_model(ModelWrapper(raw)).model.SerializeToString()
    return content


def _run_qonnx(path: Path, images: Tensor) -> list[Tensor]:
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.core.onnx_exec import execute_onnx

    model = ModelWrapper(str(path))
    (given,), outputs = model.graph.input, model.graph.output

    def run(image: Tensor) -> list[Tensor]:
        result = execute_onnx(model, {given.name: image.numpy()})
        return [torch.from_numpy(result[output.name]) for output in outputs]

    return _in_batches(run, images, 1)


def _beyond_bipolar(layer: BinaryLayer) -> str | None:
    """What keeps a layer from being a product of -1 and +1, or of floats with them."""
    if not layer.weight_quant.scaled_sign:
        return "its weights are no scale times a sign"
    if layer.input_quant is None:
        return None
    inputs = torch.randn(16, getattr(layer, layer.channels[0]), 4, 4, generator=torch.Generator().manual_seed(_SEED))
    quantizer = copy.deepcopy(layer.input_quant).cpu().float().eval()
    with torch.no_grad():
        value, _ = quantizer.quantize(inputs)
    return None if (value.abs() == 1).all() else "its inputs are not -1 and +1"


# ------------------------------------------------------------------------------------------------------ packed bits


def _write_packed(model: nn.Module, size: tuple[int, ...]) -> bytes:
    return pack(model, size).dump()


def _write_c(model: nn.Module, size: tuple[int, ...]) -> bytes:
    return c_header(pack(model, size)).encode()


def _run_packed(path: Path, images: Tensor) -> list[Tensor]:
    return _outputs(PackedModel.load(path)(images))


FORMATS: Mapping[str, Format] = {
    "onnx": Format(_write_onnx, _run_onnx, ("onnx", "onnxscript"), ("onnxruntime",)),
    "qonnx": Format(_write_qonnx, _run_qonnx, ("onnx", "onnxscript", "qonnx"), ("qonnx",), _beyond_bipolar),
    "pt2": Format(_write_pt2, _run_pt2),
    "packed": Format(_write_packed, _run_packed),
    "c": Format(_write_c, None),
}
