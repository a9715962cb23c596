"""The size report of a packed network: the MACs of its graph and the bits of its file."""

import math
from collections.abc import Mapping
from typing import Any, cast, final

import torch
from torch import fx

from bonn_qat.inspection.size_report import FLOAT_BITS, LayerReport, OtherReport, Report
from bonn_qat.runtime.layout import Geometry
from bonn_qat.runtime.packed import PackedModel

_BINARY = (
    torch.ops.bonn_qat.binary_conv2d.default, torch.ops.bonn_qat.binary_conv2d_sign.default,
    torch.ops.bonn_qat.binary_conv2d_and_sign.default,
)  # fmt: skip
_FLOAT = {
    torch.ops.aten.conv1d.default: "Conv1d", torch.ops.aten.conv2d.default: "Conv2d",
    torch.ops.aten.conv_transpose2d.input: "ConvTranspose2d", torch.ops.aten.linear.default: "Linear",
}  # fmt: skip


def packed_report(packed: PackedModel) -> Report:
    """The bits and MACs of a packed network; ``mbit`` is the size of its file without the header."""
    outputs = _Outputs(packed.network)
    packed.check(1)
    with torch.no_grad(), packed.computing():
        outputs.run(*packed.zeros(1))
    names = {buffer: name for name, buffer in packed.names.items()}
    rows = _Rows(names, {name: packed.network.get_buffer(buffer).numel() for name, buffer in packed.names.items()})
    for node, (shape, places) in outputs.shapes.items():
        rows.add(node, shape, places)
    reasons = {layer.name: layer.reason for layer in packed.layers if layer.reason}
    return Report(
        model=packed.name, input_size=packed.input_size, layers=tuple(rows.layers), others=_others(rows.left),
        trainable=0, scheme=packed.scheme or None, kept=reasons, revived=(),
    )  # fmt: skip


@final
class _Outputs(fx.Interpreter):
    """Runs a graph and records what its convolutions and linear layers give, and at how many places they multiply."""

    def __init__(self, network: fx.GraphModule) -> None:
        super().__init__(network)
        self.shapes: dict[fx.Node, tuple[tuple[int, ...], int]] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.target in _BINARY:
            geometry = Geometry.of(list(n.args[2]))  # type: ignore[arg-type]
            _, height, width, _ = self.env[n.args[0]].shape  # type: ignore[index]
            size = geometry.output_size(height, width)
            self.shapes[n] = ((geometry.out_channels, *size), math.prod(size))
        elif n.target in _FLOAT:
            shape = tuple(result.shape[1:])
            places = self.env[n.args[0]].shape[2:] if "Transpose" in _FLOAT[n.target] else shape[1:]  # type: ignore[index]
            self.shapes[n] = shape, math.prod(shape[:-1] if _FLOAT[n.target] == "Linear" else places)
        return result


class _Rows:
    """The rows of a report; ``left`` holds how many numbers of each tensor no row has counted yet."""

    def __init__(self, names: Mapping[str, str], left: dict[str, int]) -> None:
        self.names, self.left = names, left
        self.layers: list[LayerReport] = []

    def add(self, node: fx.Node, shape: tuple[int, ...], places: int) -> None:
        """Count a convolution or linear layer, once if its weights are shared."""
        (self._binary if node.target in _BINARY else self._float)(node, shape, places)

    def _take(self, node: Any) -> int:
        return (
            self.left.pop(self.names[str(node.target)], 0) if isinstance(node, fx.Node) and node.op == "get_attr" else 0
        )

    def _binary(self, node: fx.Node, shape: tuple[int, ...], places: int) -> None:
        weight, vectors = cast(fx.Node, node.args[1]), cast(fx.Node, node.args[4])
        if not self._take(weight):
            return
        count = math.prod(Geometry.of(list(cast(Any, node.args[2]))).weight_shape)
        if vectors.op == "get_attr" and (name := self.names[cast(str, vectors.target)]) in self.left:
            self.left[name] -= shape[0]
        self._row(weight, "BinaryConv2d", shape, count, places, bits=(1, 1), scales=shape[0])

    def _float(self, node: fx.Node, shape: tuple[int, ...], places: int) -> None:
        weight = cast(fx.Node, node.args[1])
        kind = _FLOAT[cast(Any, node.target)]
        words = _words(weight)
        if words is None:
            if count := self._take(weight):
                biases = self._take(node.args[2]) if len(node.args) > 2 else 0
                self._row(weight, kind, shape, count, places, bits=(FLOAT_BITS, FLOAT_BITS), biases=biases)
        elif self._take(words.args[0]):
            count = math.prod(cast(list[int], words.args[1]))
            self._row(cast(fx.Node, words.args[0]), f"Binary{kind}", shape, count, places, bits=(1, FLOAT_BITS))

    def _row(
        self,
        weight: fx.Node,
        kind: str,
        shape: tuple[int, ...],
        count: int,
        places: int,
        *,
        bits: tuple[int, int],
        scales: int = 0,
        biases: int = 0,
    ) -> None:
        name = self.names[cast(str, weight.target)].rpartition(".")[0].removesuffix(".weight_quant")
        self.layers.append(
            LayerReport(
                name=name, type=kind, output=shape, weight_bits=bits[0], input_bits=bits[1], weights=count,
                scales=scales, biases=biases, macs=places * count,
            )
        )  # fmt: skip


def _words(node: Any) -> fx.Node | None:
    """The call that unpacks the weights that ``node`` is computed from."""
    while isinstance(node, fx.Node) and node.op == "call_function":
        if node.target is torch.ops.bonn_qat.unpack_signs.default:
            return node
        node = node.args[0]
    return None


def _others(left: Mapping[str, int]) -> tuple[OtherReport, ...]:
    """The numbers that no row has counted, by the last part of the tensor's name."""
    kinds: dict[str, list[int]] = {}
    for name, count in left.items():
        if count:
            kinds.setdefault(name.rpartition(".")[2].rstrip("_"), []).append(count)
    return tuple(OtherReport(type=kind, modules=len(n), parameters=sum(n)) for kind, n in kinds.items())
