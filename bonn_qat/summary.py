"""summary: model -> Report, what a network costs when its binary weights are stored as bits.

Counted are multiply-accumulates (MACs) of convolutions and linear layers, and parameters as deployed: weights at
their bits, every scale and every other parameter at 32. A weight quantizer's own parameters, such as BONN's
modulation, serve training only; buffers, such as running statistics, are not counted, nor is what has no weights, such
as the products of attention.
"""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bonn_qat.binarize import Binarization
from bonn_qat.errors import InvalidModel
from bonn_qat.layers import BinaryLayer
from bonn_qat.modes import modes
from bonn_qat.plain import words_of
from bonn_qat.quantizers import ActivationQuantizer, WeightQuantizer
from bonn_qat.regularizers import binary_weight_layers

FLOAT_BITS = 32
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)


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


def summary(model: nn.Module, input_size: Sequence[int] | None = None) -> Report:
    """Count the bits and MACs of ``model`` for one image of ``input_size`` ``(C, H, W)``.

    None is the size that it was binarized for, else timm's default. One forward pass of zeros in evaluation mode, on
    the model's device; the model is as before afterwards. Raises InvalidModel if the size is unknown, or the model does
    not take it.
    """
    if callable(own := getattr(model, "report", None)):  # a packed network counts what it holds
        return cast(Report, own())
    size = input_size_of(model, input_size)
    record = getattr(model, "binarization", None)
    done = record if isinstance(record, Binarization) else None
    kept = dict(done.kept) if done else {}
    rows = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (*_CONVOLUTIONS, nn.Linear)) or name in kept
    }
    calls = _calls(model, list(rows.values()), size)
    binary = set(binary_weight_layers(model).values())
    counted = {id(p) for layer in model.modules() for p in _training_only(layer)}
    layers, others = [], []
    for name, module in model.named_modules():
        own = {key: p for key, p in module.named_parameters(recurse=False) if id(p) not in counted}
        counted.update(map(id, own.values()))
        if name in rows:
            scheme = done.schemes.get(name) if done else None
            bits, call = _weight_bits(module, binary), calls.get(module, _Call())
            layers.append(_layer(name, module, own, bits, call, kept.get(name), scheme.name if scheme else None))
        elif own:
            others.append((type(module).__name__, sum(p.numel() for p in own.values())))
    return Report(
        model=type(model).__name__,
        input_size=size,
        layers=tuple(layers),
        others=_by_type(others),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        scheme=done.scheme.name if done else None,
        kept=kept,
        revived=done.revived if done else (),
    )


def input_size_of(model: nn.Module, given: Sequence[int] | None) -> tuple[int, ...]:
    """``given``, else the size that ``model`` was binarized for, else timm's. Raises InvalidModel without one."""
    record, config = getattr(model, "binarization", None), getattr(model, "pretrained_cfg", None)
    said = config.get("input_size") if isinstance(config, dict) else None
    size = given or (record.input_size if isinstance(record, Binarization) else None) or said
    if size is None:
        raise InvalidModel(f"{type(model).__name__} does not say which images it takes; give input_size=(C, H, W)")
    return tuple(size)


@dataclass
class _Call:
    output: tuple[int, ...] | None = None
    macs: int = 0


def _calls(model: nn.Module, layers: list[nn.Module], size: tuple[int, ...]) -> dict[nn.Module, _Call]:
    """What each of ``layers`` gives in one forward pass, and its MACs; a shared layer's add up."""
    found: dict[nn.Module, _Call] = {}

    def count(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        source, result = (_tensor(x) for x in (inputs[0] if inputs else None, output))
        call = found.setdefault(module, _Call(output=tuple(result.shape[1:]) if isinstance(result, Tensor) else ()))
        call.macs += _layer_macs(module, source, result)

    hooks = [module.register_forward_hook(count) for module in layers]
    reference = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    try:
        with modes(model), torch.no_grad():
            model(torch.zeros(1, *size, device=reference.device, dtype=reference.dtype))
    except Exception as error:  # whatever a model raises
        raise InvalidModel(
            f"{type(model).__name__} does not take an image of {size}: {words_of(error)}; give input_size=(C, H, W)"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _tensor(x: Any) -> Any:
    # Brevitas' QuantTensor is a tuple that starts with its value.
    return x[0] if isinstance(x, tuple) else x


def _layer_macs(module: nn.Module, source: Any, result: Any) -> int:
    macs = 0
    if isinstance(module, nn.Linear):
        macs = result.numel() * module.in_features
    elif isinstance(module, _TRANSPOSED):
        macs = source.numel() * module.out_channels // module.groups * math.prod(module.kernel_size)
    elif isinstance(module, _CONVOLUTIONS):
        macs = result.numel() * module.in_channels // module.groups * math.prod(module.kernel_size)
    return macs


def _training_only(layer: nn.Module) -> list[nn.Parameter]:
    quantizer = getattr(layer, "weight_quant", None)
    return list(quantizer.parameters()) if isinstance(quantizer, nn.Module) else []


def _weight_bits(layer: nn.Module, binary: set[nn.Module]) -> int:
    quantizer = getattr(layer, "weight_quant", None)
    if isinstance(quantizer, WeightQuantizer):
        return quantizer.bits
    return 1 if layer in binary else FLOAT_BITS


def _layer(
    name: str,
    module: nn.Module,
    own: Mapping[str, nn.Parameter],
    weight_bits: int,
    call: _Call,
    kept: str | None,
    scheme: str | None,
) -> LayerReport:
    # By name, because other parameters may have as many axes, as the gain of a scaled weight standardisation.
    weights = sum(p.numel() for key, p in own.items() if "weight" in key)
    return LayerReport(
        name=name,
        type=type(module).__name__,
        output=call.output,
        weight_bits=weight_bits,
        input_bits=_input_bits(module),
        weights=weights,
        scales=_scales(module) if weight_bits < FLOAT_BITS and weights else 0,
        biases=sum(p.numel() for p in own.values()) - weights,
        macs=call.macs,
        kept=kept,
        scheme=scheme,
    )


@torch.no_grad()
def _scales(layer: nn.Module) -> int:
    proxy: Any = layer.weight_quant
    quantizer: Any = getattr(proxy, "tensor_quant", proxy)
    # A clone, because Brevitas' stock quantizer clamps the latent weights that it is given.
    weight: Tensor = (layer.latent() if isinstance(layer, BinaryLayer) else layer.weight).clone()  # type: ignore[operator]
    return quantizer.constants(weight) if isinstance(quantizer, WeightQuantizer) else quantizer(weight)[1].numel()


def _input_bits(layer: nn.Module) -> int:
    quantizer: Any = getattr(layer, "input_quant", None)
    if isinstance(quantizer, ActivationQuantizer):
        return quantizer.bits
    return int(quantizer.bit_width()) if getattr(quantizer, "is_quant_enabled", False) else FLOAT_BITS


def _by_type(others: list[tuple[str, int]]) -> tuple[OtherReport, ...]:
    sizes: dict[str, list[int]] = {}
    for kind, parameters in others:
        sizes.setdefault(kind, []).append(parameters)
    return tuple(OtherReport(type=kind, modules=len(n), parameters=sum(n)) for kind, n in sizes.items())


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
