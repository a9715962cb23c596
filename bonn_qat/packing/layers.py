"""Layers that take the place of binary ones while a network is packed: on bits, or with bits that become floats."""

import math
from typing import Any, cast, final

import torch
from torch import Tensor, nn

from bonn_qat.layers import BinaryLayer, BinaryLinear
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
    elif getattr(layer, "transposed", False):
        reason = "it is a transposed convolution"
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
        made, _ = layer.geometry(bits)
        self.geometry = Geometry(
            filters, inputs * made.groups, (height, width), cast(Any, made.stride), dilation=cast(Any, made.dilation),
            groups=made.groups,
        )  # fmt: skip
        self.signs: Tensor
        self.epilogue: Tensor
        self.thresholds: Tensor
        self.register_buffer("signs", encode_weight(flip_inputs(bits, flips, made.groups), made.groups))
        self.register_buffer("epilogue", scale.abs().reshape(1, -1).expand(1, filters).clone())
        self.register_buffer("thresholds", thresholds)
        self.layer = layer

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # models read attributes of their layers, such as kernel_size or the weight's dtype
            return getattr(super().__getattr__("layer"), name)

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(self.layer, BinaryLinear):
            return self._linear(input)
        made, place = self.layer.geometry(input)
        x = place(self.layer.as_images(input))
        numbers = self.geometry.numbers
        y = self._product(x, Geometry.of([*numbers[:6], *made.padding, *numbers[10:]]))
        if (positions := self._positions(x)) is not None:
            y = y * made.mean(positions, self.geometry.kernel)
        return self.layer.from_images(self.layer.finish(y), input)

    def _linear(self, input: Tensor) -> Tensor:
        # Not -1, which torch cannot work out for no images at all.
        flat = input.reshape(math.prod(input.shape[:-1]), self.geometry.in_channels)
        # All positions are the pixels of one row of an image.
        y = self._product(flat[None, :, None, :].permute(0, 3, 1, 2), self.geometry).permute(2, 1, 0, 3)
        positions = self._positions(flat[:, :, None, None])
        y = self.layer.finish(y if positions is None else y * positions)
        return y.reshape(*input.shape[:-1], self.geometry.out_channels)

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
