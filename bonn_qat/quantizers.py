"""Quantizers: modules ``Tensor -> Quantized``. One abstract base each for weights and activations, flat final classes.

A quantizer is what Brevitas calls a ``tensor_quant``, so the same class works in Brevitas' layers and in
:class:`bonn_qat.layers.BinaryConv2d`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
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


class Quantizer(nn.Module, ABC):
    """What weight and activation quantizers share. ``bits`` is 1 unless an instance says otherwise."""

    bits: int = 1
    parameter_rules: ClassVar[Mapping[str, ParameterRule]] = {}

    @abstractmethod
    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``x`` -> (value, scale), value of x's shape with x's gradients, scale broadcastable to it."""

    def advance(self, progress: float) -> None:
        """Told before each epoch which part of the training is done, 0 to below 1: for an estimator with a schedule."""

    def forward(self, x: Tensor) -> Quantized:
        value, scale = self.quantize(x)
        return Quantized(value, scale, x.new_zeros(()), x.new_full((), float(self.bits)))


class WeightQuantizer(Quantizer):
    """Quantizes latent weights ``(O, I, ...)``; made from float weights.

    Unless ``scaled_sign`` is false, values are ``scale * {-1, +1}``, scale ``()`` or ``(O, 1, ...)``: the layer
    convolves with the signs and scales what comes out. Otherwise it convolves with the values as they are.
    Keyword-only arguments of a subclass are options of its schemes.
    """

    scaled_sign: bool = True

    def __init__(self, weight: Tensor | None = None) -> None:
        super().__init__()

    def adopt(self, weight: Tensor) -> None:
        """Derive the quantizer's own parameters from float weights, in place."""

    def constrain(self, weight: Tensor) -> None:
        """Bring latent weights back to where the scheme wants them, in place: after each step of the optimizer."""

    def constants(self, weight: Tensor) -> int:
        """How many 32-bit numbers a deployed layer keeps beside the bits: those of the scale, unless said otherwise."""
        return self.quantize(weight)[1].numel()


class ActivationQuantizer(Quantizer):
    """Quantizes activations of any shape; ``channels`` are those of axis 1, or 1 where they are unknown.

    The value contains its scale ``()`` or ``(C, 1, 1)``, but not a scale that is a map ``(B, 1, H, W)``: by its mean
    over each window of the kernel the layer multiplies what comes out (XNOR-Net's K). Keyword-only arguments of a
    subclass are options of its schemes.
    """

    def __init__(self, channels: int = 1) -> None:
        super().__init__()


def number(value: object) -> float:
    """``value``, or nan where it is no finite number, which no comparison holds of."""
    isnumber = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if isnumber else math.nan  # type: ignore[arg-type]


def _check_choice(option: str, given: object, allowed: Sequence[str]) -> None:
    if given not in allowed:
        *others, last = map(repr, allowed)
        raise InvalidRecipe(f"the {option} is {', '.join(others)} or {last}; got {given!r}")


@final
class FrozenWeight(WeightQuantizer):
    """What is left of a weight quantizer for inference: the scale, beside a weight that is quantized already.

    The layer's ``weight`` is int8 signs where values are ``scale * {-1, +1}``, else the values themselves.
    """

    def __init__(self, quantizer: WeightQuantizer, scale: Tensor, constants: int) -> None:
        super().__init__()
        self.bits, self.scaled_sign, self._constants = quantizer.bits, quantizer.scaled_sign, constants
        self.scale: Tensor
        self.register_buffer("scale", scale.detach().abs().clone())

    @classmethod
    @torch.no_grad()
    def of(cls, quantizer: WeightQuantizer, latent: Tensor) -> tuple["FrozenWeight", Tensor]:
        """The frozen form of ``quantizer``, and the weight that it goes with."""
        value, scale = quantizer.quantize(latent)
        weight = functional.sign(value).to(torch.int8) if quantizer.scaled_sign else value.clone()
        return cls(quantizer, scale, quantizer.constants(latent)), weight

    def constants(self, weight: Tensor) -> int:
        return self._constants

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return (x.to(self.scale.dtype) * self.scale if self.scaled_sign else x), self.scale


@final
class BonnWeight(WeightQuantizer):
    """BONN's weights: ``mean(w) * sign(X)`` with a learned modulation w (:func:`functional.bonn_binarize`).

    ``granularity`` says what shares a ``modulation``: with ``"kernel"``, the ICCV paper's reading, it is
    ``(1, I, kh, kw)``, one for all kernels; with ``"plane"``, that of the authors' book, ``(1, 1, kh, kw)``, one for
    all planes of all kernels; with ``"filter"``, which is ours, ``(O, 1, 1, 1)``, one scale for each kernel.

    ``reading`` says what w is. With ``"algorithm1"``, X^ is ``mean(w) * sign(X)``, as in the paper's Algorithm 1 and
    figures. With ``"inverse"``, X^ is ``sign(X)`` and ``w^-1 X^`` convolves, as in its (1) and (3) and the book's
    (3.111), with the mean in the place of the elements (:func:`functional.bonn_binarize_inverse`), which keeps the
    weights at 1 bit. That w stays at 0.01 or above after each step (:meth:`constrain`), for at 0 the scale would be
    infinite; weight decay, which shrinks w, lets the scale grow.

    ``gradient`` ``"printed"`` is (12) and (15). With ``"derivative"`` it is that of the value, the sign alone being
    estimated: with c the scale, ``c G [|X| <= 1]`` to X and ``dc/dw sum G sign(X)`` to w.

    ``start`` says where the scale starts: at the mean of ``|weight|`` over what shares it (``"mean_magnitude"``), or
    at ``sqrt(2 / (I kh kw))``, the deviation of MSRA's initialisation (``"msra"``); w in every element there, or at its
    inverse. Raises InvalidRecipe for another value of an option.
    """

    parameter_rules: ClassVar[Mapping[str, ParameterRule]] = {"modulation": ParameterRule(slow=True)}

    def __init__(
        self,
        weight: Tensor,
        *,
        granularity: Literal["kernel", "plane", "filter"] = "kernel",
        reading: Literal["algorithm1", "inverse"] = "algorithm1",
        gradient: Literal["printed", "derivative"] = "printed",
        start: Literal["mean_magnitude", "msra"] = "mean_magnitude",
    ) -> None:
        super().__init__()
        _check_choice("granularity of BONN's modulation", granularity, ("kernel", "plane", "filter"))
        _check_choice("reading of BONN's modulation", reading, ("algorithm1", "inverse"))
        _check_choice("gradient of BONN's weights", gradient, ("printed", "derivative"))
        _check_choice("start of BONN's modulation", start, ("mean_magnitude", "msra"))
        self.granularity, self.reading, self.gradient, self.start = granularity, reading, gradient, start
        shape = [1, *weight.shape[1:]]
        if granularity == "plane" and weight.ndim > 2:
            shape[1] = 1
        elif granularity == "filter":
            shape = [len(weight), *[1] * (weight.ndim - 1)]
        self.modulation = nn.Parameter(torch.empty(shape, dtype=weight.dtype, device=weight.device))
        self.adopt(weight)

    @torch.no_grad()
    def adopt(self, weight: Tensor) -> None:
        magnitude = weight.abs()
        if self.start == "msra":
            scale = magnitude.new_full((), (2 / weight[0].numel()) ** 0.5)
        elif self.granularity == "filter":
            scale = magnitude.mean(tuple(range(1, weight.ndim)), keepdim=True)
        else:
            scale = magnitude.mean()
        if self.reading == "inverse":
            scale = scale.clamp_(min=torch.finfo(scale.dtype).tiny).reciprocal_()
        self.modulation.copy_(scale.expand_as(self.modulation))

    @torch.no_grad()
    def constrain(self, weight: Tensor) -> None:
        if self.reading == "inverse":
            self.modulation.clamp_(min=0.01)

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        is_inverse = self.reading == "inverse"
        scale = functional.bonn_scale(self.modulation.detach(), inverse=is_inverse)
        if self.gradient == "derivative":
            return functional.bonn_scale(self.modulation, inverse=is_inverse) * functional.ste_sign(x), scale
        binarize = functional.bonn_binarize_inverse if is_inverse else functional.bonn_binarize
        return binarize(x, self.modulation), scale

    def extra_repr(self) -> str:
        options = ("granularity", "reading", "gradient", "start")
        return ", ".join(f"{option}={getattr(self, option)!r}" for option in options)


@final
class SteSign(ActivationQuantizer):
    """``sign`` forward, clipped straight-through backward (:func:`functional.ste_sign`).

    Raises InvalidRecipe for a ``clip`` that is no number above 0.
    """

    def __init__(self, channels: int = 1, *, clip: float = 1.0) -> None:
        super().__init__(channels)
        if not number(clip) > 0:
            raise InvalidRecipe(f"the clip of the sign's estimator is a number above 0; got {clip!r}")
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


@final
class SwishSign(ActivationQuantizer):
    """``sign`` forward, the derivative of SignSwish backward (:func:`functional.swish_sign`)."""

    def __init__(self, channels: int = 1, *, beta: float = 5.0) -> None:
        super().__init__(channels)
        self.beta = beta

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return functional.swish_sign(x, self.beta), x.new_ones(())

    def extra_repr(self) -> str:
        return f"beta={self.beta}"


def sign_activation(
    channels: int = 1,
    *,
    estimator: Literal["ste_sign", "approx_sign", "swish_sign"] = "ste_sign",
    clip: float = 1.0,
) -> ActivationQuantizer:
    """The quantizer of ``sign`` with the backward that ``estimator`` names; for schemes that leave the choice open.

    Raises InvalidRecipe for another ``estimator``, and for a ``clip``, which is that of ``"ste_sign"``, of the others.
    """
    _check_choice("estimator of the sign", estimator, ("ste_sign", "approx_sign", "swish_sign"))
    if estimator == "ste_sign":
        return SteSign(channels, clip=clip)
    if clip != 1.0:
        raise InvalidRecipe(f"the clip is an option of the estimator 'ste_sign'; {estimator!r} has none, got {clip!r}")
    return ApproxSign(channels) if estimator == "approx_sign" else SwishSign(channels)


@final
class SteHeaviside(ActivationQuantizer):
    """``{0, 1}`` forward, clipped straight-through backward (:func:`functional.ste_heaviside`)."""

    def __init__(self, channels: int = 1, *, clip: float = 1.0) -> None:
        super().__init__(channels)
        self.clip = clip

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return functional.ste_heaviside(x, self.clip), x.new_ones(())

    def extra_repr(self) -> str:
        return f"clip={self.clip}"
