"""pack: model -> PackedModel, a network whose binary weights are bits and whose binary layers run on bits.

The network is traced (``torch.export``), so that what comes out needs neither the model's class nor the library that it
came from. Norms before signs become thresholds, what follows a binary convolution its epilogue
(:mod:`bonn_qat.packing.fuse`); the function stays the same, and the values of the binary layers are equal bit for
bit.
"""

import copy
from collections.abc import Sequence
from typing import Any, cast, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bonn_qat.binarization.binarize import Binarization, binary_layers
from bonn_qat.errors import InvalidModel
from bonn_qat.inspection.summary import input_size_of
from bonn_qat.layers import BinaryConv2d, BinaryLayer, BinaryLinear
from bonn_qat.packing.trace import capture
from bonn_qat.packing.fuse import per_input
from bonn_qat.packing.thresholds import find_thresholds
from bonn_qat.quantizers import WeightQuantizer
from bonn_qat.runtime.layout import Geometry, encode_weight, pack_words
from bonn_qat.runtime.packed import PackedLayer, PackedModel

_ops = torch.ops.bonn_qat


def pack(model: nn.Module, input_size: Sequence[int] | None = None) -> PackedModel:
    """Pack a binarized model for images of ``input_size`` ``(C, H, W)``, by default the size that it was binarized for.

    The model stays as it is; what comes out is its evaluation mode in float32 on the CPU. Layers whose weights and
    inputs have one bit run on bits. Of others with one-bit weights (BWN, MCN, DoReFa-Net, TBN, AdaBin) these are kept
    as bits; several bases (ABC-Net) stay floats: ``layers`` says so, layer by layer.

    Raises InvalidModel for a model without binary layers, one in a stage with float weights or activations, one that
    torch cannot export, or that gives other than tensors.
    """
    channels, height, width = input_size_of(model, input_size)
    size = (channels, height, width)
    ready = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
    layers = [_replace(ready, name, layer) for name, layer in list(binary_layers(ready))]
    if not layers:
        raise InvalidModel(
            f"{type(model).__name__} has no binary layer to pack; binarize it first, and one with layers of Brevitas "
            "becomes ours by bonn_qat.adapters.brevitas.from_brevitas"
        )
    network, batch = capture(ready, size)
    record = getattr(model, "binarization", None)
    return PackedModel(
        network.graph, network.tensors, network.weights, name=type(model).__name__, input_size=size, batch=batch,
        scheme=record.scheme.name if isinstance(record, Binarization) else "", layers=layers,
    )  # fmt: skip


def _replace(model: nn.Module, name: str, layer: BinaryLayer) -> PackedLayer:
    """Put the packed form of ``layer`` into its place."""
    if layer.stand_in is not None or not layer.binary_weight:
        raise InvalidModel(
            f"{name} is in a stage of its training with float weights or activations; it is not 1-bit yet"
        )
    value, scale = layer.weight_quant.quantize(layer.latent())
    signs = _signs(layer)
    reason = ""
    if not layer.weight_quant.scaled_sign:
        reason = "its weights are not a scale times a sign"
    elif signs is None:
        reason = "its inputs are not bits" if layer.input_quant is None or layer.input_quant.bits != 1 else (
            "its inputs are not of two opposite values, by a threshold for each channel"
        )  # fmt: skip
    if not reason and signs is not None:
        thresholds, flips, magnitude = signs
        new = _bits(layer, value, scale * magnitude, thresholds, flips)
        for at, module in list(model.named_modules(remove_duplicate=False)):
            if module is layer:
                model.set_submodule(at, new)
        return PackedLayer(name=name, kind="bits")
    if (kept := _PackedWeight.of(layer.weight_quant, value, scale)) is None:
        layer.freeze()
        return PackedLayer(name=name, kind="float", reason=f"its weights have {layer.weight_quant.bits} bits")
    layer.weight_quant, layer.kernel_std = kept, None
    return PackedLayer(name=name, kind="weights", reason=reason)


@final
class _PackedWeight(WeightQuantizer):
    """One-bit weights that become floats for a product: signs and a scale, or the values of either bit."""

    def __init__(self, quantizer: WeightQuantizer, bits: Tensor, scale: Tensor, values: Tensor | None) -> None:
        super().__init__()
        self.bits, self.scaled_sign, self.shape = quantizer.bits, quantizer.scaled_sign, list(bits.shape)
        self.words: Tensor
        self.scale: Tensor
        self.values: Tensor | None
        self.register_buffer("words", pack_words(bits))
        self.register_buffer("scale", scale.abs().clone())
        self.register_buffer("values", values)

    @classmethod
    def of(cls, quantizer: WeightQuantizer, value: Tensor, scale: Tensor) -> "_PackedWeight | None":
        """None where the weights of a filter, below one tap, have more than two values."""
        if quantizer.scaled_sign:
            return cls(quantizer, value >= 0, scale, None)
        taps = tuple(range(2, value.ndim))
        for axes in ((1, *taps), (1,)):
            low, high = value.amin(axes, keepdim=True), value.amax(axes, keepdim=True)
            if ((value == low) | (value == high)).all():
                values = torch.stack((low, high))
                return cls(quantizer, value == high, scale, values[:, : _period(values)].clone())
        return None

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        signs = _ops.unpack_signs(self.words, self.shape)
        if self.values is None:
            return signs, self.scale
        grouped = signs.reshape(-1, self.values.shape[1], *self.shape[1:])
        return torch.where(grouped > 0, self.values[1], self.values[0]).reshape(self.shape), self.scale


def _period(values: Tensor) -> int:
    """After how many filters, axis 1, ``values`` repeat (MCN's planes)."""
    filters = values.shape[1]
    for count in (n for n in range(1, filters) if filters % n == 0):
        if torch.equal(values[:, count:], values[:, :-count]):
            return count
    return filters


@final
class _Bits(nn.Module):
    """A binary layer that runs on bits; its parts after the product are the layer's own."""

    def __init__(self, layer: BinaryLayer, geometry: Geometry, bits: Tensor, scale: Tensor, thresholds: Tensor) -> None:
        super().__init__()
        self.layer, self.geometry = layer, geometry
        self.weight: Tensor
        self.epilogue: Tensor
        self.thresholds: Tensor
        self.register_buffer("weight", encode_weight(bits, geometry.groups))
        self.register_buffer("epilogue", scale.abs().reshape(1, -1).expand(1, geometry.out_channels).clone())
        self.register_buffer("thresholds", thresholds)

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(self.layer, BinaryLinear):
            return self._linear(input)
        layer = cast(BinaryConv2d, self.layer)
        x, geometry = input, self.geometry
        padding: tuple[int, int, int, int] = (0, 0, 0, 0)
        if layer.same_padding:
            left, right, top, bottom = layer._same_padding(x)
            padding = (top, bottom, left, right)
        elif layer._explicit_padding is None:
            down, across = cast(tuple[int, int], layer.padding)
            padding = (down, down, across, across)
        elif layer._explicit_padding[1] == "constant":
            left, right, top, bottom = layer._explicit_padding[0]
            padding = (top, bottom, left, right)
        else:
            x = F.pad(x, *layer._explicit_padding)  # pixels that are there: the sign comes after
        y = self._product(x, Geometry.of([*geometry.numbers[:6], *padding, *geometry.numbers[10:]]))
        positions = self._positions(x)
        if positions is not None:
            top, bottom, left, right = padding
            window = positions.new_full((1, 1, *geometry.kernel), 1 / geometry.taps)
            padded = F.pad(positions, (left, right, top, bottom)) if any(padding) else positions
            y = y * torch.conv2d(padded, window, None, geometry.stride, 0, geometry.dilation)
        return layer.finish(y)

    def _linear(self, input: Tensor) -> Tensor:
        flat = input.reshape(-1, self.geometry.in_channels)
        y = self._product(flat[None, :, None, :].permute(0, 3, 1, 2), self.geometry).permute(2, 1, 0, 3)
        positions = self._positions(flat[:, :, None, None])
        y = self.layer.finish(y if positions is None else y * positions)
        return y.reshape(*input.shape[:-1], self.geometry.out_channels)

    def _product(self, x: Tensor, geometry: Geometry) -> Tensor:
        codes = _ops.sign_codes(x, self.thresholds, geometry.numbers)
        y: Tensor = _ops.binary_conv2d(codes, self.weight, geometry.numbers, [0, 0], self.epilogue, None)
        return y

    def _positions(self, x: Tensor) -> Tensor | None:
        assert self.layer.input_quant is not None
        scale = self.layer.input_quant.quantize(self.layer.norm(x))[1]
        return scale if scale.ndim == 4 else None


def _bits(layer: BinaryLayer, value: Tensor, scale: Tensor, thresholds: Tensor, flips: Tensor) -> _Bits:
    kernels = value >= 0
    out_channels, group_channels, *kernel = kernels.shape
    is_linear = isinstance(layer, BinaryLinear)
    groups = 1 if is_linear else cast(BinaryConv2d, layer).groups
    stride, dilation = ((1, 1), (1, 1)) if is_linear else (layer.stride, layer.dilation)
    geometry = Geometry(
        out_channels, group_channels * groups, (kernel[0], kernel[1]), cast(Any, stride), (0, 0, 0, 0),
        cast(Any, dilation), groups,
    )  # fmt: skip
    # A channel that is +1 below its threshold is one that is -1 there, times -1.
    return _Bits(layer, geometry, kernels ^ per_input(flips, geometry), scale, thresholds)


def _signs(layer: BinaryLayer) -> tuple[Tensor, Tensor, Tensor] | None:
    """Thresholds and flips, ``(C,)``, of norm and sign together, and the magnitude ``()`` of the values.

    None where the inputs are not of two opposite values, by a threshold for each channel.
    """
    quantizer = layer.input_quant
    if quantizer is None or quantizer.bits != 1:
        return None
    channels = layer.in_features if isinstance(layer, BinaryLinear) else cast(BinaryConv2d, layer).in_channels

    def values(x: Tensor) -> Tensor:
        value: Tensor = quantizer.quantize(layer.norm(x))[0]
        return value

    def above(x: Tensor) -> Tensor:
        return values(x[None, :, None, None])[0, :, 0, 0] > 0

    try:
        thresholds, flips = find_thresholds(above, channels)
        probes = torch.randn(64, channels, 1, 1, generator=torch.Generator().manual_seed(0))
        around = torch.where(thresholds.isfinite(), thresholds, 0)[:, None, None]
        probes[1::2] = around + 1e-3 * probes[1::2]
        found = values(probes)
    except (RuntimeError, ValueError):  # a norm or a quantizer that does not take single pixels
        return None
    magnitude = found.flatten()[0].abs()
    expected = torch.where((probes >= thresholds[:, None, None]) ^ flips[:, None, None], magnitude, -magnitude)
    return (thresholds, flips, magnitude) if torch.equal(found, expected) else None
