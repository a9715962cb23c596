"""Layers that take the place of binary ones while a network is packed: on bits, or with bits that become floats."""

import math
from typing import Any, cast, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bonn_qat.layers import BinaryConv2d, BinaryLayer, BinaryLinear
from bonn_qat.packing.thresholds import flip_inputs, sign_thresholds
from bonn_qat.quantizers import WeightQuantizer
from bonn_qat.runtime.layout import Geometry, encode_weight, pack_words
from bonn_qat.runtime.operators import MOST_INPUTS
from bonn_qat.runtime.packed import PackedLayer

_ops = torch.ops.bonn_qat


def pack_layer(model: nn.Module, name: str, layer: BinaryLayer) -> PackedLayer:
    """Replace ``layer`` by its packed form, wherever it occurs in ``model``; return which form, and why."""
    value, scale = layer.weight_quant.quantize(layer.latent())
    signs = sign_thresholds(layer)
    reason = ""
    if not layer.weight_quant.scaled_sign:
        reason = "its weights are not a scale times a sign"
    elif layer.input_quant is None or layer.input_quant.bits != 1:
        reason = "its inputs are not bits"
    elif signs is None:
        reason = "its inputs are not two opposite values, separated by a threshold for each channel"
    elif (inputs := math.prod(value.shape[1:])) > MOST_INPUTS:
        reason = f"each of its filters has {inputs:,} inputs; a product of bits takes at most {MOST_INPUTS:,}"
    if not reason and signs is not None:
        thresholds, flips, magnitude = signs
        new = BitsLayer(layer, value >= 0, scale * magnitude, thresholds, flips)
        for place, module in list(model.named_modules(remove_duplicate=False)):
            if module is layer:
                model.set_submodule(place, new)
        return PackedLayer(name=name, kind="bits")
    if (kept := OneBitWeight.of(layer.weight_quant, value, scale)) is None:
        layer.freeze()
        return PackedLayer(name=name, kind="float", reason=f"its weights have {layer.weight_quant.bits} bits")
    layer.weight_quant, layer.kernel_std = kept, None
    return PackedLayer(name=name, kind="weights", reason=reason)


@final
class BitsLayer(nn.Module):
    """A binary layer whose weights and inputs are bits; what comes after the product is the layer's own.

    ``bits`` ``(O, I / groups, kh, kw)`` are true for +1, ``scale`` ``()`` or ``(O, 1, ...)`` multiplies the product. An
    input is +1 where it is within its channel's ``thresholds`` ``(2, I)``, or where it is not if ``flips`` ``(I,)``.
    """

    def __init__(self, layer: BinaryLayer, bits: Tensor, scale: Tensor, thresholds: Tensor, flips: Tensor) -> None:
        super().__init__()
        filters, inputs, height, width = bits.shape
        groups, stride, dilation = 1, (1, 1), (1, 1)
        if isinstance(layer, BinaryConv2d):
            groups = layer.groups
            stride, dilation = (cast(tuple[int, int], pair) for pair in (layer.stride, layer.dilation))
        self.geometry = Geometry(filters, inputs * groups, (height, width), stride, dilation=dilation, groups=groups)
        self.signs: Tensor
        self.epilogue: Tensor
        self.thresholds: Tensor
        self.register_buffer("signs", encode_weight(flip_inputs(bits, flips, groups), groups))
        self.register_buffer("epilogue", scale.abs().reshape(1, -1).expand(1, filters).clone())
        self.register_buffer("thresholds", thresholds)
        self.layer = layer

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # models read attributes of their layers, such as kernel_size or the weight's dtype
            return getattr(super().__getattr__("layer"), name)

    def forward(self, input: Tensor) -> Tensor:
        return self._linear(input) if isinstance(self.layer, BinaryLinear) else self._conv2d(input)

    def _conv2d(self, x: Tensor) -> Tensor:
        x, padding = self._padded(x)
        numbers = self.geometry.numbers
        y = self._product(x, Geometry.of([*numbers[:6], *padding, *numbers[10:]]))
        if (positions := self._positions(x)) is not None:
            top, bottom, left, right = padding
            window = positions.new_full((1, 1, *self.geometry.kernel), 1 / self.geometry.taps)
            padded = F.pad(positions, (left, right, top, bottom)) if any(padding) else positions
            y = y * torch.conv2d(padded, window, None, self.geometry.stride, 0, self.geometry.dilation)
        return self.layer.finish(y)

    def _linear(self, input: Tensor) -> Tensor:
        # Not -1, which torch cannot work out for no images at all.
        flat = input.reshape(math.prod(input.shape[:-1]), self.geometry.in_channels)
        # All positions are the pixels of one row of an image.
        y = self._product(flat[None, :, None, :].permute(0, 3, 1, 2), self.geometry).permute(2, 1, 0, 3)
        positions = self._positions(flat[:, :, None, None])
        y = self.layer.finish(y if positions is None else y * positions)
        return y.reshape(*input.shape[:-1], self.geometry.out_channels)

    def _padded(self, x: Tensor) -> tuple[Tensor, tuple[int, int, int, int]]:
        """``x``, and the zeros (top, bottom, left, right) that the product adds around its signs."""
        layer = cast(BinaryConv2d, self.layer)
        explicit = (layer._same_padding(x), "constant") if layer.same_padding else layer._explicit_padding
        if explicit is None:
            down, across = cast(tuple[int, int], layer.padding)
            return x, (down, down, across, across)
        sides, mode = explicit
        if mode != "constant":
            return F.pad(x, sides, mode), (0, 0, 0, 0)  # pixels of the image, which have signs
        left, right, top, bottom = sides
        return x, (top, bottom, left, right)

    def _product(self, x: Tensor, geometry: Geometry) -> Tensor:
        codes = _ops.sign_codes(x, self.thresholds, geometry.numbers)
        y: Tensor = _ops.binary_conv2d(codes, self.signs, geometry.numbers, [0, 0], self.epilogue, None)
        return y

    def _positions(self, x: Tensor) -> Tensor | None:
        """The scale of the inputs if it is a map ``(B, 1, H, W)`` (XNOR-Net's K)."""
        assert self.layer.input_quant is not None
        scale = self.layer.input_quant.quantize(self.layer.norm(x))[1]
        return scale if scale.ndim == 4 else None


@final
class OneBitWeight(WeightQuantizer):
    """Weights that are kept as bits and become floats for a product: signs and a scale, or the values of either bit."""

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
    def of(cls, quantizer: WeightQuantizer, value: Tensor, scale: Tensor) -> "OneBitWeight | None":
        """None where a filter, or a filter's tap, has weights of more than two values."""
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
