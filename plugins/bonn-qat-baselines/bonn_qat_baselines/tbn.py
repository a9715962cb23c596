"""TBN (Wan et al., ECCV 2018): ternary activations and binary weights; the paper's, and TBNv2 of the authors' code.

W latent weights ``(O, I, kh, kw)`` or ``(O, I)``; alpha ``(O, 1, ...)``; I activations ``(B, C, H, W)`` or ``(B, C)``;
T their ternary values; Delta a layer's threshold, a scalar; G the gradient of the quantized W or I. As read from the
authors' code, where the paper's delta is 0.4 and the code's 0.5.
"""

import math
from collections.abc import Iterable
from typing import Any, Literal, cast, final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bonn_qat import BonnQatError, Scheme, distributed, hookimpl
from bonn_qat.functional import sign
from bonn_qat.quantizers import ActivationQuantizer, WeightQuantizer

_MOMENTUM = 0.01
_NORMAL_MAGNITUDE = math.sqrt(2 / math.pi)  # E|N(0, 1)|


@final
class TbnWeight(WeightQuantizer):
    """``alpha * sign(W)`` with ``alpha = mean|W|`` over each output filter.

    Backward: ``G``, straight-through without a mask and without alpha, as in the authors' code.
    """

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """W -> (alpha sign(W), alpha)."""
        alpha = x.detach().abs().mean(tuple(range(1, x.ndim)), keepdim=True)
        # The difference is exactly 0, so that a filter keeps its two values.
        return alpha * sign(x.detach()) + (x - x.detach()), alpha


class _Ternarize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: Tensor, scaled: bool) -> Tensor:
        ctx.save_for_backward(x, threshold)
        ctx.scaled = scaled
        ternary = (x >= threshold).to(x.dtype).sub_((x <= -threshold).to(x.dtype))
        return ternary.mul_(2 * threshold) if scaled else ternary

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, threshold = ctx.saved_tensors
        if not ctx.scaled:
            return grad * (x.abs() <= 1), None, None
        steps = x / threshold.clamp(min=torch.finfo(x.dtype).tiny)
        slope = torch.fmod(steps + 3, 2).sub_(1).abs_().mul_(2)
        return torch.where(x.abs() <= 2 * threshold, grad * slope, 0), None, None


@final
class TbnActivation(ActivationQuantizer):
    """``T``: +1 where ``I >= Delta``, -1 where ``I <= -Delta``, else 0; with ``variant="tbnv2"`` ``2 Delta T``.

    ``Delta = delta * mean|I|`` over the whole input in training, a constant of the backward pass. In evaluation it is
    ``running_threshold``, the moving average of these with momentum 0.01 as in the
    code (a buffer, part of the state dict), which
    starts at ``delta * E|N(0, 1)|``, because the input is batch-normalized. An input of zeros alone stays 0.

    Backward: ``G [|I| <= 1]``, the mask that the code intends; with ``variant="tbnv2"``
    ``G 2 |fmod(I / Delta + 3, 2) - 1| [|I| <= 2 Delta]``, the slope of two parabolas between each pair of steps (the
    code's ``order`` 2). Raises BonnQatError for a ``delta`` that is not a number above 0 and another ``variant``.
    """

    bits = 2

    def __init__(self, channels: int = 1, *, delta: float = 0.4, variant: Literal["tbn", "tbnv2"] = "tbn") -> None:
        super().__init__(channels)
        if not 0 < delta < math.inf:
            raise BonnQatError(f"the option delta of the scheme 'tbn' must be a number above 0; got {delta!r}")
        if variant not in ("tbn", "tbnv2"):
            raise BonnQatError(f"the option variant of the scheme 'tbn' must be 'tbn' or 'tbnv2'; got {variant!r}")
        self.delta, self.variant = delta, variant
        self.running_threshold: Tensor
        self.register_buffer("running_threshold", torch.tensor(delta * _NORMAL_MAGNITUDE))

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """I -> (T, 1) or (2 Delta T, 2 Delta)."""
        if self.training:
            threshold = self.delta * distributed.average(x.detach().abs().mean())
            self.running_threshold.lerp_(threshold.to(self.running_threshold.dtype), _MOMENTUM)
        else:
            threshold = self.running_threshold.to(x.dtype, copy=True)
        scaled = self.variant == "tbnv2"
        value = cast(Tensor, _Ternarize.apply(x, threshold, scaled))
        return value, 2 * threshold if scaled else torch.ones_like(threshold)

    def extra_repr(self) -> str:
        """The options, for ``print(model)``."""
        return f"delta={self.delta}, variant={self.variant!r}"


TBN = Scheme(
    name="tbn",
    title="TBN",
    reference="Wan et al., TBN: Convolutional Neural Network with Ternary Inputs and Binary Weights, ECCV 2018",
    weight=TbnWeight,
    activation=TbnActivation,
)


@hookimpl
def bonn_qat_schemes() -> Iterable[Scheme]:
    """Offer ``tbn``."""
    yield TBN
