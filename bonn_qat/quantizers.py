"""Quantizers: modules ``Tensor -> Quantized``, with one abstract base class for weights and one for activations.

Words that this package uses throughout:

- A *latent weight* is the float number behind a binary weight. The forward pass uses its sign; the optimizer updates
  the float, so that small gradients add up until the sign flips. After the training only the sign is kept.
- An *estimator* is a function that binarizes in the forward pass and, in the backward pass, replaces the derivative of
  the sign, which is zero almost everywhere, by one that can train a network. The straight-through estimator is the
  best known; :mod:`bonn_qat.functional` has others.
- A *scale* is the float by which the signs are multiplied, one per layer or per filter, so that the binary weights
  have about the magnitude of the float ones: ``value = scale * sign``.
- A *modulation* is the learned tensor w of BONN. Its mean is the scale, and its elements weight the gradients.

A *quantizer* combines an estimator and a scale: latent weights or activations go in, values come out. It follows the
contract of Brevitas' ``tensor_quant``, so the same class works in Brevitas' layers and in
:class:`bonn_qat.layers.BinaryConv2d`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, NamedTuple, final

import torch
from torch import Tensor, nn

from bonn_qat import functional
from bonn_qat.engine.functions import Estimator as Estimator  # a name for plugins
from bonn_qat.errors import InvalidRecipe


class Quantized(NamedTuple):
    """The result of every quantizer; the order is that of Brevitas' ``tensor_quant``."""

    value: Tensor
    scale: Tensor
    zero_point: Tensor
    bit_width: Tensor


class ParameterRule(NamedTuple):
    """How the optimizer treats a parameter: ``slow``, at a reduced learning rate; ``decay``, with weight decay."""

    slow: bool = False
    decay: bool = True


class Quantizer(nn.Module, ABC):
    """Base of weight and activation quantizers. ``bits`` is 1 unless a subclass or an instance sets another number."""

    bits: int = 1
    parameter_rules: ClassVar[Mapping[str, ParameterRule]] = {}

    @abstractmethod
    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (value, scale): value has the shape of ``x`` and passes gradients to it; scale is broadcastable."""

    def advance(self, progress: float) -> None:
        """Set an estimator's schedule: called before each epoch with the part of the training that is done, in [0, 1).

        Does nothing by default.
        """

    def forward(self, x: Tensor) -> Quantized:
        value, scale = self.quantize(x)
        return Quantized(value, scale, x.new_zeros(()), x.new_full((), float(self.bits)))


class WeightQuantizer(Quantizer):
    """Base of quantizers for latent weights ``(O, I, ...)``; constructed from float weights.

    If ``scaled_sign`` is true, which is the default, values must be ``scale * {-1, +1}`` with a scale ``()`` or
    ``(O, 1, ...)``: the layer convolves with the signs and multiplies the output by the scale. Otherwise it convolves
    with the values as they are. Keyword-only arguments of a subclass become options of its schemes.

    >>> class MeanMagnitude(WeightQuantizer):
    ...     def quantize(self, x):
    ...         scale = x.abs().mean(tuple(range(1, x.ndim)), keepdim=True).detach()
    ...         return scale * functional.ste_sign(x), scale
    >>> value, scale, zero_point, bit_width = MeanMagnitude()(torch.tensor([[0.5, -1.5]]))
    >>> value, scale, bit_width
    (tensor([[ 1., -1.]]), tensor([[1.]]), tensor(1.))
    """

    scaled_sign: bool = True

    def __init__(self, weight: Tensor | None = None) -> None:
        super().__init__()

    def adopt(self, weight: Tensor) -> None:
        """Initialize the quantizer's own parameters from float weights, in place."""

    def constrain(self, weight: Tensor) -> None:
        """Project latent weights back into the scheme's range, in place; called after each optimizer step."""

    def constants(self, weight: Tensor) -> int:
        """The number of 32-bit constants that a deployed layer stores beside the bits; by default, the scale's."""
        return self.quantize(weight)[1].numel()


class ActivationQuantizer(Quantizer):
    """Base of quantizers for activations of any shape; ``channels`` is the size of axis 1, or 1 if it is unknown.

    A scale ``()`` or ``(C, 1, 1)`` must be contained in the value. A scale that is a map ``(B, 1, H, W)`` must not: the
    layer averages it over the kernel's windows and multiplies its output by the result (XNOR-Net's K). Keyword-only
    arguments of a subclass become options of its schemes.

    A subclass that sets ``is_pure`` to true says that ``quantize`` changes nothing, that it depends on nothing but x,
    parameters, buffers and ``training``, and that its scale is no map. A layer then keeps only its float input for the
    backward pass, and calls ``quantize`` again there; else it keeps what autograd keeps.

    >>> class Sign(ActivationQuantizer):
    ...     def quantize(self, x):
    ...         return functional.ste_sign(x), x.new_ones(())
    >>> Sign()(torch.tensor([-2.0, 0.3])).value
    tensor([-1.,  1.])
    """

    is_pure: bool = False

    def __init__(self, channels: int = 1) -> None:
        super().__init__()

    def estimator(self) -> Estimator | None:
        """The estimator, if ``quantize`` takes a sign and the training engine has kernels for it; else None.

        With one, a layer takes the signs itself, as bits, and never calls ``quantize`` in a training step on a CPU.
        """
        return None

    @final
    def value(self, x: Tensor) -> Tensor:
        """The value alone."""
        return self.quantize(x)[0]


def number(value: object) -> float:
    """``value`` as a float, or NaN if it is not a finite number, so that every comparison with it is false.

    >>> number(3), number("3"), number(True)
    (3.0, nan, nan)
    """
    isnumber = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if isnumber else math.nan  # type: ignore[arg-type]


def _check_choice(option: str, given: object, allowed: Sequence[str]) -> None:
    if given not in allowed:
        *others, last = map(repr, allowed)
        raise InvalidRecipe(f"the {option} must be {', '.join(others)} or {last}; got {given!r}")


@final
class FrozenWeight(WeightQuantizer):
    """A weight quantizer reduced to its scale, for inference with a weight that is already quantized.

    The layer's ``weight`` then holds int8 signs if values are ``scale * {-1, +1}``, and the values themselves if not.
    """

    def __init__(self, quantizer: WeightQuantizer, scale: Tensor, constants: int) -> None:
        super().__init__()
        self.bits, self.scaled_sign, self._constants = quantizer.bits, quantizer.scaled_sign, constants
        self.scale: Tensor
        self.register_buffer("scale", scale.detach().abs().clone())

    @classmethod
    @torch.no_grad()
    def of(cls, quantizer: WeightQuantizer, latent: Tensor) -> tuple["FrozenWeight", Tensor]:
        """The frozen form of ``quantizer``, and the quantized weight that belongs to it."""
        value, scale = quantizer.quantize(latent)
        weight = functional.sign(value).to(torch.int8) if quantizer.scaled_sign else value.clone()
        return cls(quantizer, scale, quantizer.constants(latent)), weight

    def constants(self, weight: Tensor) -> int:
        return self._constants

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return (x.to(self.scale.dtype) * self.scale if self.scaled_sign else x), self.scale


_STARTS = ("mean_magnitude", "msra", "msra_fan_out")


@final
class BonnWeight(WeightQuantizer):
    """BONN's weights: ``mean(w) * sign(X)`` with a learned modulation w (:func:`~bonn_qat.functional.bonn_binarize`).

    ``granularity`` is the shape of ``modulation``: ``"kernel"``, the ICCV paper's reading, is ``(1, I, kh, kw)``,
    shared by all kernels of a layer; ``"plane"``, the reading of the authors' book, is ``(1, 1, kh, kw)``, shared by
    all planes of all kernels; ``"filter"``, our extension, is ``(O, 1, 1, 1)``, one scale per kernel.

    ``reading`` is the meaning of w. With ``"algorithm1"``, X^ is ``mean(w) * sign(X)``, as in the paper's Algorithm 1
    and figures. With ``"inverse"``, X^ is ``sign(X)`` and the layer convolves with ``w^-1 X^``, as in (1) and (3) of
    the paper and (3.111) of the book, with the mean instead of the elements (``bonn_binarize_inverse``),
    which keeps the weights at 1 bit. In that reading ``constrain`` keeps w at or above 0.01, because the scale
    would be infinite at 0; weight decay shrinks w and so lets the scale grow.

    ``gradient="printed"`` uses (12) and (15). ``gradient="derivative"`` differentiates the value and estimates the sign
    alone: with c the scale, ``c G [|X| <= 1]`` to X and ``dc/dw sum G sign(X)`` to w.

    ``start`` is the initial scale: a number, or the mean of ``|weight|`` over the elements that share it
    (``"mean_magnitude"``; of the float weights, before ``latent_std`` rescales them), or the standard deviation of the
    MSRA initialization, with the inputs, ``sqrt(2 / (I kh kw))`` (``"msra"``), or the outputs, ``sqrt(2 / (O kh kw))``
    (``"msra_fan_out"``). Our ``wrn`` and ``birealnet`` networks are initialized with the outputs, so that their mean
    magnitude is 0.8 times the last. The paper does not say; its Fig. 5 begins at about 0.062, 0.046 and 0.032 in the
    layers 2, 8 and 14 of WRN-22, with 64, 128 and 256 outputs, where the last is 0.059, 0.042 and 0.029. Every element
    of w starts at that scale, or at its inverse, which is bounded where the weights are 0. Raises InvalidRecipe for any
    other value of an option.

    >>> quantizer = BonnWeight(torch.tensor([[[[0.5, -0.3]]], [[[0.1, 0.3]]]]))
    >>> quantizer.modulation.shape, quantizer(torch.randn(2, 1, 1, 2)).scale
    (torch.Size([1, 1, 1, 2]), tensor(0.3000))
    """

    parameter_rules: ClassVar[Mapping[str, ParameterRule]] = {"modulation": ParameterRule(slow=True)}
    _LEAST = 0.01  # of w in the reading "inverse"

    def __init__(
        self,
        weight: Tensor,
        *,
        granularity: Literal["kernel", "plane", "filter"] = "kernel",
        reading: Literal["algorithm1", "inverse"] = "algorithm1",
        gradient: Literal["printed", "derivative"] = "printed",
        start: Literal["mean_magnitude", "msra", "msra_fan_out"] | float = "mean_magnitude",
    ) -> None:
        super().__init__()
        _check_choice("granularity of BONN's modulation", granularity, ("kernel", "plane", "filter"))
        _check_choice("reading of BONN's modulation", reading, ("algorithm1", "inverse"))
        _check_choice("gradient of BONN's weights", gradient, ("printed", "derivative"))
        if not number(start) > 0:
            _check_choice("start of BONN's modulation, if it is not a number above 0,", start, _STARTS)
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
        if isinstance(self.start, int | float):
            scale = magnitude.new_full((), self.start)
        elif self.start != "mean_magnitude":
            fan = weight.numel() / weight.shape[0 if self.start == "msra" else 1]
            scale = magnitude.new_full((), (2 / fan) ** 0.5)
        elif self.granularity == "filter":
            scale = magnitude.mean(tuple(range(1, weight.ndim)), keepdim=True)
        else:
            scale = magnitude.mean()
        if self.reading == "inverse":
            scale = scale.clamp_(torch.finfo(scale.dtype).eps, 1 / self._LEAST).reciprocal_()
        self.modulation.copy_(scale.expand_as(self.modulation))

    @torch.no_grad()
    def constrain(self, weight: Tensor) -> None:
        if self.reading == "inverse":
            self.modulation.clamp_(min=self._LEAST)

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
    """``sign`` forward, clipped straight-through backward (:func:`~bonn_qat.functional.ste_sign`).

    Raises InvalidRecipe if ``clip`` is not a number above 0.
    """

    is_pure = True

    def __init__(self, channels: int = 1, *, clip: float = 1.0) -> None:
        super().__init__(channels)
        if not number(clip) > 0:
            raise InvalidRecipe(f"the clip of the sign's estimator must be a number above 0; got {clip!r}")
        self.clip = clip

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return functional.ste_sign(x, self.clip), x.new_ones(())

    def estimator(self) -> Estimator:
        return Estimator(clip=self.clip)

    def extra_repr(self) -> str:
        return f"clip={self.clip}"


@final
class ApproxSign(ActivationQuantizer):
    """``sign`` forward, piecewise-linear backward (:func:`~bonn_qat.functional.approx_sign`)."""

    is_pure = True

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return functional.approx_sign(x), x.new_ones(())

    def estimator(self) -> Estimator:
        return Estimator(parabola=True)


@final
class SwishSign(ActivationQuantizer):
    """``sign`` forward, derivative of SignSwish backward (:func:`~bonn_qat.functional.swish_sign`)."""

    is_pure = True

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
    """The ``sign`` quantizer whose backward pass is the named ``estimator``; for schemes that leave the choice open.

    Raises InvalidRecipe for any other ``estimator``, and for a ``clip`` with an estimator other than ``"ste_sign"``.

    >>> sign_activation(estimator="ste_sign", clip=0.5)
    SteSign(clip=0.5)
    """
    _check_choice("estimator of the sign", estimator, ("ste_sign", "approx_sign", "swish_sign"))
    if estimator == "ste_sign":
        return SteSign(channels, clip=clip)
    if clip != 1.0:
        raise InvalidRecipe(f"only the estimator 'ste_sign' has a clip; got clip={clip!r} with {estimator!r}")
    return ApproxSign(channels) if estimator == "approx_sign" else SwishSign(channels)
