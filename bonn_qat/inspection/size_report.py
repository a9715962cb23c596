"""Size report: the bits and MACs of a network, per layer and in total, as data and as a table."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from rich.console import Group
from rich.text import Text

from bonn_qat.files.plain import printable
from bonn_qat.tables import Column, Table, as_html, as_text, facts

FLOAT_BITS = 32


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """A convolution, a linear layer, or another layer that stays float for a reason; MACs are per image.

    ``output`` is the shape for one image without the batch axis, None for a layer that was not called. ``kept`` is the
    reason why the layer stays float, ``scheme`` the name of its own scheme if it has one. MACs are counted for
    convolutions and linear layers only.
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
        """Weights at their own bits, scales and biases at 32 bits."""
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
        """MACs of a binary weight and a binary input."""
        return self.macs if self.is_binary else 0

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
    """A network's bits and MACs, per layer and in total; ``input_size`` is ``(C, H, W)``.

    ``trainable`` counts the trained parameters, including those of quantizers. What :func:`bonn_qat.binarize` did is in
    ``scheme`` (None for a float network), ``kept`` (layer -> reason) and ``revived`` (norms whose weights were zero).
    ``print`` shows the report as a table; a rich console fits it to the terminal.
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
        """Deployed parameters without the scales of binary weights: as many as the float network has."""
        return sum(x.weights + x.biases for x in self.layers) + sum(x.parameters for x in self.others)

    @property
    def binary_weights(self) -> int:
        """Parameters with one bit."""
        return sum(x.weights for x in self.layers if x.weight_bits == 1)

    @property
    def binarized_weights_share(self) -> float:
        """The share of the parameters that have one bit, 0 to 1."""
        return self.binary_weights / self.parameters if self.parameters else 0.0

    @property
    def uncounted(self) -> tuple[str, ...]:
        """The layers whose MACs are not counted: not called, or neither a convolution nor linear."""
        return tuple(x.name for x in self.layers if not x.macs)

    @property
    def mbit(self) -> float:
        """Size of the packed network, in 10^6 bits."""
        return (sum(x.size_bits for x in self.layers) + sum(x.parameters for x in self.others) * FLOAT_BITS) / 1e6

    @property
    def float_mbit(self) -> float:
        """Size of the float network, in 10^6 bits."""
        return self.parameters * FLOAT_BITS / 1e6

    @property
    def compression(self) -> float:
        """How many times smaller the packed network is than the float one."""
        return self.float_mbit / self.mbit if self.mbit else 1.0

    @property
    def macs(self) -> int:
        """MACs per image."""
        return sum(x.macs for x in self.layers)

    @property
    def binary_macs(self) -> int:
        """MACs of a binary weight and a binary input, per image."""
        return sum(x.binary_macs for x in self.layers)

    @property
    def binarized_share(self) -> float:
        """The share of the MACs that are binary, 0 to 1."""
        return self.binary_macs / self.macs if self.macs else 0.0

    @property
    def bops(self) -> int:
        """Bit operations per image."""
        return sum(x.bops for x in self.layers)

    def __rich__(self) -> Group:
        size = " x ".join(map(str, self.input_size))
        stay: dict[str, list[str]] = {}
        for layer in self.layers:
            if layer.kept:
                stay.setdefault(layer.kept, []).append(layer.name)
        lines = {
            "parameters": f"{self.parameters:,}, of which {self.binary_weights:,} have one bit "
            f"({self.binarized_weights_share:.1%}); {self.trainable:,} are trained",
            "size": f"{self.mbit:,.2f} Mbit, {self.compression:.2f} times smaller than {self.float_mbit:,.2f} Mbit",
            "MACs": f"{self.macs:,}, of which {self.binary_macs:,} are binary ({self.binarized_share:.1%})",
            "BOPs": f"{self.bops:,}",
            "stay float": "\n".join(f"{reason}: {_listed(names)}" for reason, names in stay.items()),
            "no MACs": self.uncounted and f"not called, or of another kind: {_listed(self.uncounted)}",
            "norms reset": self.revived and f"start at one instead of zero: {_listed(self.revived)}",
        }
        head = f"{self.model}, scheme {self.scheme or 'none (float)'}, one image of {size}"
        return Group(Text(printable(head)), "", _table(self), "", facts((k, str(v)) for k, v in lines.items() if v))

    def __str__(self) -> str:
        return as_text(self)

    def _repr_html_(self) -> str:
        return as_html(*self.__rich__().renderables)


def _table(report: Report) -> Table:
    """A row for each layer, then one for each other type of module.

    Parameters are listed by their bits, as in Larq's summary; biases and scales have 32.
    """
    precisions = sorted({FLOAT_BITS, *(x.weight_bits for x in report.layers)})
    unit = 1e6 if max((x.macs for x in report.layers), default=0) >= 1e6 else 1
    columns = [
        Column("layer", text=True, wraps=True),
        Column("type", text=True, drop=3),
        Column("output", drop=2),
        Column("bits W/A"),
        *(Column(f"{bits}-bit") for bits in precisions),
        Column("KiB", drop=1),
        Column("MACs" if unit == 1 else "MACs (M)"),
        Column("scheme", text=True, optional=True),
    ]
    rows = [
        [
            x.name,
            x.type,
            "not called" if x.output is None else "x".join(map(str, x.output)),
            f"{x.weight_bits}/{x.input_bits}",
            *(
                _number(x.weights * (bits == x.weight_bits) + (x.biases + x.scales) * (bits == FLOAT_BITS))
                for bits in precisions
            ),
            f"{x.size_kib:,.2f}",
            _number(x.macs) if unit == 1 else f"{x.macs / unit:,.2f}" if x.macs else "",
            x.scheme or "",
        ]
        for x in report.layers
    ]
    for x in report.others:
        floats = [_number(x.parameters * (bits == FLOAT_BITS)) for bits in precisions]
        rows.append([f"{x.modules} x {x.type}", "", "", str(FLOAT_BITS), *floats, f"{x.size_kib:,.2f}", "", ""])
    return Table(columns, rows)


def _number(number: int) -> str:
    return f"{number:,}" if number else ""


def _listed(names: Iterable[str]) -> str:
    """Names of layers, with those that differ only in their numbers as one pattern and a count."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(".".join("*" if part.isdigit() else part for part in name.split(".")), []).append(name)
    return ", ".join(found[0] if len(found) == 1 else f"{key} ({len(found)})" for key, found in alike.items())
