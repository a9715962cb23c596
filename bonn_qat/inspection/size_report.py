"""Size report: the bits and MACs of a network as frozen data, per layer and in total, and as a table."""

import io
from collections.abc import Mapping
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table

FLOAT_BITS = 32


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """A convolution, a linear layer, or another that stayed float for a reason; MACs are per input image.

    ``output`` is the shape that came out for one image, its first axis aside, None for a layer that was not called;
    ``kept`` is why the layer stayed float, ``scheme`` the name of one of its own. Layers that are neither convolutions
    nor linear have no MACs here.
    """

    name: str
    type: str
    output: tuple[int, ...] | None
    weight_bits: int
    input_bits: int
    weights: int
    scales: int
    biases: int
    macs: int
    kept: str | None = None
    scheme: str | None = None

    @property
    def size_bits(self) -> int:
        """Weights at their bits, scales and biases at 32."""
        return self.weights * self.weight_bits + (self.scales + self.biases) * FLOAT_BITS

    @property
    def size_kib(self) -> float:
        """The packed size, in KiB."""
        return self.size_bits / 8 / 2**10

    @property
    def is_binary(self) -> bool:
        """Whether weights and inputs have one bit each, so that a MAC is an XNOR and a count."""
        return self.weight_bits == self.input_bits == 1

    @property
    def binary_macs(self) -> int:
        """MACs of one bit by one bit."""
        return self.macs if self.is_binary else 0

    @property
    def float_macs(self) -> int:
        """MACs with a float, or many-bit, weight or input."""
        return self.macs - self.binary_macs

    @property
    def bops(self) -> int:
        """Bit operations: MACs times the bits of both factors."""
        return self.macs * self.weight_bits * self.input_bits


@dataclass(frozen=True, kw_only=True)
class OtherReport:
    """The parameters of all other modules of one type, such as norms; each has 32 bits."""

    type: str
    modules: int
    parameters: int

    @property
    def size_kib(self) -> float:
        """Their size, in KiB."""
        return self.parameters * FLOAT_BITS / 8 / 2**10


@dataclass(frozen=True, kw_only=True)
class Report:
    """A network's bits and MACs, per layer and in total; ``input_size`` is ``(C, H, W)``, a Mbit 10^6 bits.

    ``trainable`` counts the parameters that learn, those of the quantizers among them. ``scheme``, ``kept``
    (layer -> reason) and ``revived`` (norms that started at zero) repeat what :func:`bonn_qat.binarize` did; a float
    network has scheme None.
    """

    model: str
    input_size: tuple[int, ...]
    layers: tuple[LayerReport, ...]
    others: tuple[OtherReport, ...]
    trainable: int
    scheme: str | None
    kept: Mapping[str, str]
    revived: tuple[str, ...]

    @property
    def parameters(self) -> int:
        """Parameters that deploy, scales of binary weights aside: those of the same network all float."""
        return sum(x.weights + x.biases for x in self.layers) + sum(x.parameters for x in self.others)

    @property
    def binary_weights(self) -> int:
        """Parameters of one bit."""
        return sum(x.weights for x in self.layers if x.weight_bits == 1)

    @property
    def binarized_weights_share(self) -> float:
        """The part of the parameters that has one bit, 0 to 1."""
        return self.binary_weights / self.parameters if self.parameters else 0.0

    @property
    def uncounted(self) -> tuple[str, ...]:
        """The layers whose MACs are not known: neither convolutions nor linear, or not called themselves."""
        return tuple(x.name for x in self.layers if not x.macs)

    @property
    def mbit(self) -> float:
        """The packed network."""
        return (sum(x.size_bits for x in self.layers) + sum(x.parameters for x in self.others) * FLOAT_BITS) / 1e6

    @property
    def float_mbit(self) -> float:
        """The same network all float."""
        return self.parameters * FLOAT_BITS / 1e6

    @property
    def compression(self) -> float:
        """How many times smaller the packed network is."""
        return self.float_mbit / self.mbit if self.mbit else 1.0

    @property
    def macs(self) -> int:
        """MACs per image."""
        return sum(x.macs for x in self.layers)

    @property
    def binary_macs(self) -> int:
        """MACs of one bit by one bit, per image."""
        return sum(x.binary_macs for x in self.layers)

    @property
    def binarized_share(self) -> float:
        """The part of the MACs that is binary, 0 to 1."""
        return self.binary_macs / self.macs if self.macs else 0.0

    @property
    def bops(self) -> int:
        """Bit operations per image."""
        return sum(x.bops for x in self.layers)

    def __str__(self) -> str:
        size = " x ".join(map(str, self.input_size))
        lines = [
            f"{self.model}, scheme {self.scheme or 'none (float)'}, one image of {size}",
            _table(_columns(self)),
            f"parameters  {self.parameters:,}, of which {self.binary_weights:,} of one bit "
            f"({self.binarized_weights_share:.1%}); {self.trainable:,} learn",
            f"size        {self.mbit:,.2f} Mbit, {self.compression:.2f} times smaller than {self.float_mbit:,.2f} Mbit",
            f"MACs        {self.macs:,}, of which {self.binary_macs:,} binary ({self.binarized_share:.1%})",
            f"BOPs        {self.bops:,}",
        ]
        if self.uncounted:
            lines.append(f"MACs not counted of what is not called or of another kind: {', '.join(self.uncounted)}")
        if self.revived:
            lines.append(f"norms that started at zero and now start at one: {', '.join(self.revived)}")
        return "\n".join(lines)


def _columns(report: Report) -> dict[str, list[str]]:
    """The table by columns: a row for each layer, then one for each other type of module.

    Parameters stand under their bits, as in Larq's summary, biases and scales under 32.
    """
    layers, others = report.layers, report.others
    precisions = sorted({FLOAT_BITS, *(x.weight_bits for x in layers)})
    columns = {
        "layer": [*(x.name for x in layers), *("" for _ in others)],
        "type": [*(x.type for x in layers), *(f"{x.modules} x {x.type}" for x in others)],
        "output": [*(_shape(x) for x in layers), *("" for _ in others)],
        "bits W/A": [*(f"{x.weight_bits}/{x.input_bits}" for x in layers), *(str(FLOAT_BITS) for _ in others)],
    }
    for bits in precisions:
        numbers = [*(_parameters(x, bits) for x in layers), *(x.parameters * (bits == FLOAT_BITS) for x in others)]
        columns[f"{bits}-bit"] = _numbers(numbers)
    columns["KiB"] = [f"{kib:,.2f}" for kib in (*(x.size_kib for x in layers), *(x.size_kib for x in others))]
    columns["binary MACs"] = _numbers([*(x.binary_macs for x in layers), *(0 for _ in others)])
    columns["float MACs"] = _numbers([*(x.float_macs for x in layers), *(0 for _ in others)])
    columns["scheme"] = [*(x.scheme or "" for x in layers), *("" for _ in others)]
    columns["stays float as"] = [*(x.kept or "" for x in layers), *("" for _ in others)]
    return {header: cells for header, cells in columns.items() if header != "scheme" or any(cells)}


def _shape(layer: LayerReport) -> str:
    return "not called" if layer.output is None else "x".join(map(str, layer.output))


def _parameters(layer: LayerReport, bits: int) -> int:
    return layer.weights * (bits == layer.weight_bits) + (layer.biases + layer.scales) * (bits == FLOAT_BITS)


def _numbers(numbers: list[int]) -> list[str]:
    return [f"{number:,}" if number else "" for number in numbers]


def _table(columns: Mapping[str, list[str]]) -> str:
    table = Table(box=box.SIMPLE)
    for header in columns:
        is_text = header in ("layer", "type", "scheme", "stays float as")
        table.add_column(header, no_wrap=True, justify="left" if is_text else "right")
    for row in zip(*columns.values(), strict=True):
        table.add_row(*row)
    text = io.StringIO()
    # Wide enough that nothing is cut: a file has no width, and the caller knows the terminal's.
    Console(file=text, width=400, markup=False, emoji=False, highlight=False, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()).rstrip("\n")
