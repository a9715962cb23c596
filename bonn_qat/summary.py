"""summary: model -> Report, what a network costs when its binary weights are stored as bits.

Counted are multiply-accumulates (MACs) of convolutions and linear layers, and parameters as deployed: weights at
their bits, every scale and every other parameter at 32. A weight quantizer's own parameters, such as BONN's
modulation, serve training only; buffers, such as running statistics, are not counted.
"""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bonn_qat.binarize import Binarization
from bonn_qat.errors import InvalidModel
from bonn_qat.modes import modes
from bonn_qat.quantizers import ActivationQuantizer, WeightQuantizer
from bonn_qat.regularizers import binary_weight_layers

FLOAT_BITS = 32
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """A convolution or a linear layer; MACs are per input image, ``kept`` is why the layer stayed float."""

    name: str
    type: str
    weight_bits: int
    input_bits: int
    weights: int
    scales: int
    biases: int
    macs: int
    kept: str | None = None

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

    ``scheme``, ``kept`` (layer -> reason) and ``revived`` (norms that started at zero) repeat what
    :func:`bonn_qat.binarize` did; a float network has scheme None.
    """

    model: str
    input_size: tuple[int, ...]
    layers: tuple[LayerReport, ...]
    others: tuple[OtherReport, ...]
    scheme: str | None
    kept: Mapping[str, str]
    revived: tuple[str, ...]

    @property
    def parameters(self) -> int:
        """Parameters that deploy, scales of binary weights aside: those of the same network all float."""
        return sum(x.weights + x.biases for x in self.layers) + sum(x.parameters for x in self.others)

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
        rows = [_layer_row(layer) for layer in self.layers]
        rows += [
            ("", f"{x.modules} x {x.type}", "32", f"{x.parameters:,}", f"{x.size_kib:,.2f}", "", "", "")
            for x in self.others
        ]
        size = " x ".join(map(str, self.input_size))
        lines = [
            f"{self.model}, scheme {self.scheme or 'none (float)'}, one image of {size}",
            _table(rows).rstrip("\n"),
            f"parameters  {self.parameters:,}",
            f"size        {self.mbit:,.2f} Mbit, {self.compression:.2f} times smaller than {self.float_mbit:,.2f} Mbit",
            f"MACs        {self.macs:,}, of which {self.binary_macs:,} binary ({self.binarized_share:.1%})",
            f"BOPs        {self.bops:,}",
        ]
        if self.revived:
            lines.append(f"norms that started at zero and now start at one: {', '.join(self.revived)}")
        return "\n".join(lines)


def summary(model: nn.Module, input_size: Sequence[int] | None = None) -> Report:
    """Count the bits and MACs of ``model`` for one image of ``input_size`` ``(C, H, W)``, timm's default if None.

    One forward pass of zeros in evaluation mode, on the model's device; the model is as before afterwards.
    Raises InvalidModel if the size is unknown, or the model does not take it.
    """
    size = _input_size(model, input_size)
    macs = _macs(model, size)
    binary = set(binary_weight_layers(model).values())
    record = getattr(model, "binarization", None)
    kept = dict(record.kept) if isinstance(record, Binarization) else {}
    counted = {id(p) for layer in model.modules() for p in _training_only(layer)}
    layers, others = [], []
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if id(p) not in counted]
        counted.update(map(id, own))
        if isinstance(module, (*_CONVOLUTIONS, nn.Linear)):
            bits = _weight_bits(module, binary)
            layers.append(_layer(name, module, own, bits, macs.get(module, 0), kept.get(name)))
        elif own:
            others.append((type(module).__name__, sum(p.numel() for p in own)))
    return Report(
        model=type(model).__name__,
        input_size=size,
        layers=tuple(layers),
        others=_by_type(others),
        scheme=record.scheme.name if isinstance(record, Binarization) else None,
        kept=kept,
        revived=record.revived if isinstance(record, Binarization) else (),
    )


def _input_size(model: nn.Module, given: Sequence[int] | None) -> tuple[int, ...]:
    config = getattr(model, "pretrained_cfg", None)
    size = given if given is not None else config.get("input_size") if isinstance(config, dict) else None
    if size is None:
        raise InvalidModel(f"{type(model).__name__} does not say which images it takes; give input_size=(C, H, W)")
    return tuple(size)


def _macs(model: nn.Module, size: tuple[int, ...]) -> dict[nn.Module, int]:
    """MACs of every convolution and linear layer in one forward pass; a shared layer's add up."""
    found: dict[nn.Module, int] = {}

    def count(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        source, result = (_tensor(x) for x in (inputs[0], output))
        found[module] = found.get(module, 0) + _layer_macs(module, source, result)

    layers = [module for module in model.modules() if isinstance(module, (*_CONVOLUTIONS, nn.Linear))]
    hooks = [module.register_forward_hook(count) for module in layers]
    reference = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    try:
        with modes(model), torch.no_grad():
            model(torch.zeros(1, *size, device=reference.device, dtype=reference.dtype))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise InvalidModel(
            f"{type(model).__name__} does not take an image of {size}: {error}; give input_size=(C, H, W)"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _tensor(x: Any) -> Tensor:
    # Brevitas' QuantTensor is a tuple that starts with its value.
    first: Tensor = x[0] if isinstance(x, tuple) else x
    return first


def _layer_macs(module: nn.Module, source: Tensor, result: Tensor) -> int:
    if isinstance(module, nn.Linear):
        return result.numel() * module.in_features
    if isinstance(module, _TRANSPOSED):
        return source.numel() * module.out_channels // module.groups * math.prod(module.kernel_size)
    assert isinstance(module, _CONVOLUTIONS)
    return result.numel() * module.in_channels // module.groups * math.prod(module.kernel_size)


def _training_only(layer: nn.Module) -> list[nn.Parameter]:
    quantizer = getattr(layer, "weight_quant", None)
    return list(quantizer.parameters()) if isinstance(quantizer, nn.Module) else []


def _weight_bits(layer: nn.Module, binary: set[nn.Module]) -> int:
    quantizer = getattr(layer, "weight_quant", None)
    if isinstance(quantizer, WeightQuantizer):
        return quantizer.bits
    return 1 if layer in binary else FLOAT_BITS


def _layer(
    name: str, module: nn.Module, own: list[nn.Parameter], weight_bits: int, macs: int, kept: str | None
) -> LayerReport:
    weights = sum(p.numel() for p in own if p.ndim > 1)
    return LayerReport(
        name=name,
        type=type(module).__name__,
        weight_bits=weight_bits,
        input_bits=_input_bits(module),
        weights=weights,
        scales=_scales(module) if weight_bits < FLOAT_BITS and weights else 0,
        biases=sum(p.numel() for p in own) - weights,
        macs=macs,
        kept=kept,
    )


@torch.no_grad()
def _scales(layer: nn.Module) -> int:
    proxy: Any = layer.weight_quant
    quantizer: Any = getattr(proxy, "tensor_quant", proxy)
    # A clone, because Brevitas' stock quantizer clamps the latent weights that it is given.
    weight: Tensor = layer.weight.clone()  # type: ignore[operator]
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


def _layer_row(layer: LayerReport) -> tuple[str, ...]:
    return (
        layer.name,
        layer.type,
        f"{layer.weight_bits}/{layer.input_bits}",
        f"{layer.weights + layer.biases:,}",
        f"{layer.size_kib:,.2f}",
        f"{layer.binary_macs:,}" if layer.binary_macs else "",
        f"{layer.float_macs:,}" if layer.float_macs else "",
        layer.kept or "",
    )


def _table(rows: list[tuple[str, ...]]) -> str:
    table = Table(box=box.SIMPLE)
    headers = ("layer", "type", "bits W/A", "parameters", "KiB", "binary MACs", "float MACs", "stays float as")
    for header in headers:
        is_text = header in ("layer", "type", "stays float as")
        table.add_column(header, no_wrap=True, justify="left" if is_text else "right")
    for row in rows:
        table.add_row(*row)
    text = io.StringIO()
    # Wide enough that nothing is cut: a file has no width, and the caller knows the terminal's.
    Console(file=text, width=400, markup=False, emoji=False, highlight=False, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())
