"""Quantizers: modules ``Tensor -> Quantized``. One abstract base each for weights and activations, flat final classes.

A quantizer is what Brevitas calls a ``tensor_quant``, so the same class works in Brevitas' layers and in
:class:`bonn_qat.layers.BinaryConv2d`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Literal, NamedTuple, final

import torch
from torch import Tensor, nn

from bonn_qat import functional
from bonn_qat.errors import InvalidRecipe


class Quantized(NamedTuple):
    """What every quantizer returns; the order is that of Brevitas' ``tensor_quant``."""

    value: Tensor
    scale: Tensor
    zero_point: Tensor
    bit_width: Tensor


class ParameterRule(NamedTuple):
    """How an optimizer treats a parameter: at a tenth of the learning rate or not, with weight decay or not."""

    slow: bool = False
    decay: bool = True


class _Quantizer(nn.Module, ABC):
    bits: ClassVar[int] = 1
    parameter_rules: ClassVar[Mapping[str, ParameterRule]] = {}

    @abstractmethod
    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``x`` -> (value, scale), value of x's shape with x's gradients, scale broadcastable to it."""

    def forward(self, x: Tensor) -> Quantized:
        value, scale = self.quantize(x)
        return Quantized(value, scale, x.new_zeros(()), x.new_full((), float(self.bits)))


class WeightQuantizer(_Quantizer):
    """Binarizes latent weights ``(O, I, ...)`` to ``scale * {-1, +1}``, scale ``()`` or ``(O, 1, ...)``."""

    def adopt(self, weight: Tensor) -> None:
        """Derive the quantizer's own parameters from float weights, in place."""


class ActivationQuantizer(_Quantizer):
    """Binarizes activations of any shape to {-1, +1}."""


@final
class BonnWeight(WeightQuantizer):
    """BONN's weights: ``mean(w) * sign(X)`` with a learned modulation w (:func:`functional.bonn_binarize`).

    ``modulation`` is ``(1, I, kh, kw)``, the reading of the ICCV paper, or with ``granularity="plane"``
    ``(1, 1, kh, kw)``, that of the authors' book. It starts at the mean of ``|weight|`` in every element.
    Raises InvalidRecipe for another ``granularity``.
    """

    parameter_rules: ClassVar[Mapping[str, ParameterRule]] = {"modulation": ParameterRule(slow=True)}

    def __init__(self, weight: Tensor, *, granularity: Literal["kernel", "plane"] = "kernel") -> None:
        super().__init__()
        if granularity not in ("kernel", "plane"):
            raise InvalidRecipe(f"the granularity of BONN's modulation is 'kernel' or 'plane'; got {granularity!r}")
        shape = list(weight.shape)
        shape[0] = 1
        if granularity == "plane" and weight.ndim > 2:
            shape[1] = 1
        self.modulation = nn.Parameter(torch.empty(shape, dtype=weight.dtype, device=weight.device))
        self.adopt(weight)

    @torch.no_grad()
    def adopt(self, weight: Tensor) -> None:
        self.modulation.copy_(weight.abs().mean().expand_as(self.modulation))

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return functional.bonn_binarize(x, self.modulation), self.modulation.detach().mean()


@final
class SteSign(ActivationQuantizer):
    """``sign`` forward, clipped straight-through backward (:func:`functional.ste_sign`)."""

    def __init__(self, clip: float = 1.0) -> None:
        super().__init__()
        self.clip = clip

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return functional.ste_sign(x, self.clip), x.new_ones(())

    def extra_repr(self) -> str:
        return f"clip={self.clip}"


@final
class ApproxSign(ActivationQuantizer):
    """``sign`` forward, piecewise-linear backward (:func:`functional.approx_sign`)."""

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return functional.approx_sign(x), x.new_ones(())
