"""What a C header needs to know about a packed network: its tensors, convolutions and epilogues, with names in C."""

import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast, final

import torch
from torch import fx

from bonn_qat.errors import InvalidModel
from bonn_qat.runtime import epilogue
from bonn_qat.runtime.layout import Geometry
from bonn_qat.runtime.packed import PackedModel

_ops = torch.ops.bonn_qat
SIGN, VALUES, SIGN_OF, BOTH, ELEMENTWISE = (
    _ops.sign_codes.default, _ops.binary_conv2d.default, _ops.binary_conv2d_sign.default,
    _ops.binary_conv2d_and_sign.default, _ops.elementwise.default,
)  # fmt: skip
_OPERATIONS = {getattr(epilogue, name): name for name in ("SCALE", "ADD", "FMA", "RESIDUAL", "PRELU", "CLAMP")}


@dataclass(frozen=True, kw_only=True)
class Epilogue:
    """An epilogue; ``struct``, ``program`` and ``vectors`` are identifiers, ``steps`` are written in C."""

    struct: str
    channels: int
    program: str
    steps: Sequence[str]
    vectors: str

    @property
    def numbers(self) -> tuple[object, ...]:
        """The members of a ``bonn_qat_epilogue``."""
        return self.channels, len(self.steps), self.program, self.vectors


@dataclass(frozen=True, kw_only=True)
class Convolution:
    """A binary convolution: ``sign`` gives its ``codes``. Sizes are (C, H, W); words and thresholds are identifiers."""

    codes: fx.Node
    sign: fx.Node
    geometry: Geometry
    input: tuple[int, int, int]
    output: tuple[int, int, int]
    words: str
    thresholds: str
    epilogue: Epilogue


class Network:
    """A packed network as C needs it.

    By node, in the order in which they run: ``values``, what each gives for an image; ``tensors``, the names of those
    that are tensors; ``convolutions`` and ``elementwise``, and their ``structs``. By the name of a tensor: ``bits``,
    the shape of those that are bits, and ``arrays``. Structs, arrays and the ``table`` of convolutions are identifiers.
    """

    def __init__(self, packed: PackedModel, prefix: str) -> None:
        self.nodes = list(packed.network.graph.nodes)
        self.values = _Values(packed).found
        tensors = {buffer: name for name, buffer in packed.names.items()}
        self.tensors = {node: tensors[cast(str, node.target)] for node in self.nodes if node.op == "get_attr"}
        called = [node for node in self.nodes if node.op == "call_function"]
        convolutions = [node for node in called if node.target in (VALUES, SIGN_OF, BOTH)]
        elementwise = [node for node in called if node.target is ELEMENTWISE]
        self.bits = {self.tensor(node, "weight"): _geometry(node).weight_shape for node in convolutions} | {
            self.tensor(node, "words"): tuple(arguments(node)["shape"])
            for node in called if node.target is _ops.unpack_signs.default
        }  # fmt: skip
        names = _Names(prefix)
        self.table = names.new("convolutions")
        # In the order of the graph: that of a file's tensors is another.
        self.arrays = {
            tensor: names.new(f"{tensor.removesuffix('.words')}.words" if tensor in self.bits else tensor)
            for tensor in dict.fromkeys(self.tensors.values())
        }
        layers = {node: self.tensor(node, "weight") for node in convolutions}
        layers |= {node: self.tensor(node, "vectors") for node in elementwise}
        self.structs = {node: names.new(tensor.rpartition(".")[0] or node.name) for node, tensor in layers.items()}
        self._programs = {
            node: names.new(f"{struct.removeprefix(prefix)}.program") for node, struct in self.structs.items()
        }
        self.convolutions = {node: self._convolution(node) for node in convolutions}
        self.elementwise = {node: self._epilogue(node, self.values[node].shape[1]) for node in elementwise}

    def tensor(self, node: fx.Node, argument: str) -> str:
        """The name of the tensor passed as an argument of ``node``."""
        value = arguments(node)[argument]
        if value not in self.tensors:
            raise InvalidModel(f"{node} computes its {argument}; a C header needs constant tensors")
        return self.tensors[value]

    def _array(self, node: fx.Node, argument: str) -> str:
        return self.arrays[self.tensor(node, argument)]

    def _epilogue(self, node: fx.Node, channels: int) -> Epilogue:
        program = arguments(node)["program"]
        if not program:
            raise InvalidModel(f"{node} has an empty epilogue; C has no empty arrays")
        pairs = zip(program[::2], program[1::2], strict=True)
        return Epilogue(
            struct=self.structs[node], channels=channels, program=self._programs[node],
            steps=[f"{{BONN_QAT_{_OPERATIONS[operation]}, {row}}}" for operation, row in pairs],
            vectors=self._array(node, "vectors"),
        )  # fmt: skip

    def _convolution(self, node: fx.Node) -> Convolution:
        codes, geometry = arguments(node)["codes"], _geometry(node)
        sign = codes.args[0] if codes.target is operator.getitem and codes.args[1] == 1 else codes
        if sign.target not in (SIGN, SIGN_OF, BOTH):
            raise InvalidModel(f"{node} reads codes from {sign}; a C header needs those of a sign")
        written = _geometry(sign, "geometry" if sign.target is SIGN else "following")
        alike = [(each.in_channels, each.groups, each.padding) for each in (written, geometry)]
        if alike[0] != alike[1]:
            raise InvalidModel(f"{node} has codes for {written}; a C header takes those for its own {geometry}")
        _, rows, columns, _ = self.values[codes].shape
        top, bottom, left, right = geometry.padding
        return Convolution(
            codes=codes, sign=sign, geometry=geometry, words=self._array(node, "weight"),
            input=(geometry.in_channels, rows - top - bottom, columns - left - right),
            output=(geometry.out_channels, *geometry.output_size(rows, columns)),
            thresholds=self._array(sign, "thresholds"), epilogue=self._epilogue(node, geometry.out_channels),
        )  # fmt: skip


def arguments(node: fx.Node) -> Mapping[str, Any]:
    """The arguments of an operator of ours, by name."""
    names = [argument.name for argument in cast(Any, node.target)._schema.arguments]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def _geometry(node: fx.Node, argument: str = "geometry") -> Geometry:
    return Geometry.of(list(arguments(node)[argument]))


@final
class _Values(fx.Interpreter):
    """Runs a graph and keeps what each node gives."""

    def __init__(self, packed: PackedModel) -> None:
        super().__init__(packed.network)
        self.found: dict[fx.Node, Any] = {}
        with torch.no_grad():
            self.run(torch.zeros(1, *packed.input_size).contiguous(memory_format=torch.channels_last))

    def run_node(self, n: fx.Node) -> Any:
        self.found[n] = super().run_node(n)
        return self.found[n]


class _Names:
    """Identifiers in small letters, each given once: none of them is a macro, which are in capitals."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._taken: set[str] = set()

    def new(self, name: str) -> str:
        """An identifier like ``name``."""
        plain = f"{self._prefix}_{re.sub('[^a-z0-9]+', '_', name.lower()).strip('_')}"
        found, count = plain, 1
        while found in self._taken:
            count += 1
            found = f"{plain}_{count}"
        self._taken.add(found)
        return found
