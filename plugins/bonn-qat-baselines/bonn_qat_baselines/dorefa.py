"""DoReFa-Net (Zhou et al., 2016, arXiv:1606.06160): weights, activations and gradients of chosen numbers of bits.

W latent weights ``(O, I, kh, kw)`` or ``(O, I)``; x activations ``(B, C, ...)``; G the gradient of quantized weights,
dr that of a layer's output; k bits. ``quantize_k(r) = round((2^k - 1) r) / (2^k - 1)`` for r in [0, 1], halves go to
the even neighbour; its backward is the identity.

The default, 1-bit weights, 4-bit activations and float gradients, is the 1/4 of published tables. The blocks are those
of the other schemes; activations are clipped and rounded where the others binarize them.
"""

from collections.abc import Iterable
from typing import Any, cast, final

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bonn_qat import BonnQatError, Scheme, hookimpl
from bonn_qat.functional import sign
from bonn_qat.quantizers import ActivationQuantizer, WeightQuantizer

_BITS = (*range(1, 9), 32)  # up to 8 bits, half-precision types can tell the levels apart


def _checked(option: str, bits: int) -> int:
    if bits not in _BITS:
        raise BonnQatError(f"the option {option} of the scheme 'dorefa' must be 1 to 8, or 32 for float; got {bits!r}")
    return int(bits)


def _quantize(r: Tensor, bits: int) -> Tensor:
    levels: int = 2**bits - 1
    # The difference is exactly 0, so that the value stays on its level, with the derivative 1.
    return (r.detach() * levels).round_().div_(levels).add_(r - r.detach())


class _Clip(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return cast(Tensor, grad * ((x >= 0) & (x <= 1)))  # torch's own clamp leaves the bounds out


@final
class DorefaWeight(WeightQuantizer):
    """Weights of ``weight_bits`` = k bits: 1 to 8, or 32.

    - 1: ``E|W| sign(W)`` with one scale for the layer, ``()``, a constant of the backward pass, which gives ``G``;
    - 2 to 8: ``2 quantize_k(tanh(W) / (2 max|tanh(W)|) + 1/2) - 1``, the maximum over the layer. Backward is the
      derivative of all but the rounding, the maximum too: with ``v = tanh(W)`` and ``m = max|v| = |v_j|``,
      ``(1 - v_i^2)/m (G_i - [i = j] sign(v_j)/m sum_l G_l v_l)``;
    - 32: ``W``.

    In a layer of zeros, or of weights up to ``tiny ** 0.75``, 3e-29 in float32, max|tanh(W)| counts as 1.
    The 2^k levels from 2 bits on are ``-1, -1 + 2/(2^k - 1), ..., 1`` in every layer, so that the scale is 1 and a
    deployed layer stores k bits for each weight and no constant; with 1 bit it stores E|W|.
    Raises BonnQatError for another ``weight_bits``.
    """

    def __init__(self, weight: Tensor, *, weight_bits: int = 1) -> None:
        super().__init__()
        self.bits = _checked("weight_bits", weight_bits)
        self.scaled_sign = self.bits == 1

    def constants(self, weight: Tensor) -> int:
        """1 with 1-bit weights, else 0."""
        return int(self.bits == 1)

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """W -> (quantized W, E|W| or 1)."""
        if self.bits == 1:
            scale = x.detach().abs().mean()
            return scale * sign(x.detach()) + (x - x.detach()), scale
        if self.bits == 32:
            return x, x.new_ones(())
        bounded = torch.tanh(x)
        peak = bounded.abs().amax()
        peak = torch.where(peak > torch.finfo(x.dtype).tiny ** 0.75, peak, 1.0)
        return 2 * _quantize(bounded / (2 * peak) + 0.5, self.bits) - 1, x.new_ones(())

    def extra_repr(self) -> str:
        """The option, for ``print(model)``."""
        return f"weight_bits={self.bits}"


@final
class DorefaActivation(ActivationQuantizer):
    """``quantize_k(clip(x, 0, 1))``, with 32 bits ``clip(x, 0, 1)``; the scale is 1, ``()``.

    ``activation_bits`` = k is 1 to 8, or 32; the levels are ``0, 1/(2^k - 1), ..., 1``. Backward:
    ``dy * [0 <= x <= 1]``. Raises BonnQatError for another ``activation_bits``.
    """

    is_pure = True

    def __init__(self, channels: int = 1, *, activation_bits: int = 4) -> None:
        super().__init__(channels)
        self.bits = _checked("activation_bits", activation_bits)

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x -> (quantized x, 1)."""
        clipped = cast(Tensor, _Clip.apply(x))
        return clipped if self.bits == 32 else _quantize(clipped, self.bits), x.new_ones(())

    def extra_repr(self) -> str:
        """The option, for ``print(model)``."""
        return f"activation_bits={self.bits}"


class _QuantizeGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int) -> Tensor:
        ctx.bits = bits
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        levels = 2**ctx.bits - 1
        # Half precision would round the noise away.
        dr = grad.to(torch.promote_types(grad.dtype, torch.float32))
        span = 2 * dr.abs().amax(tuple(range(1, dr.ndim)), keepdim=True)
        noise = (torch.rand_like(dr) - 0.5) / levels
        # A sample without a gradient has the span 0 and stays 0. Rounding can lift the largest above the top level.
        r = (dr / torch.where(span > 0, span, torch.ones_like(span)) + 0.5 + noise).clamp_(0, 1)
        return (span * ((r * levels).round_().div_(levels) - 0.5)).to(grad.dtype), None


@final
class GradientQuantizer(nn.Module):
    """The identity on a layer's output; its gradient is rounded to ``gradient_bits`` = k bits: 1 to 8, or 32.

    Backward: ``2 max|dr| [quantize_k(dr / (2 max|dr|) + 1/2 + N) - 1/2]`` with the maximum over all axes but the
    batch's, the first, and the noise ``N = s / (2^k - 1)``, s uniform in [-1/2, 1/2), one draw of torch's global
    generator for each element. With the noise the result has dr as its mean. With 32 bits it is dr.
    Raises BonnQatError for another ``gradient_bits``.
    """

    def __init__(self, channels: int = 1, *, gradient_bits: int = 32) -> None:
        super().__init__()
        self.gradient_bits = _checked("gradient_bits", gradient_bits)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, ...)``, unchanged."""
        return x if self.gradient_bits == 32 else cast(Tensor, _QuantizeGradient.apply(x, self.gradient_bits))

    def extra_repr(self) -> str:
        """The option, for ``print(model)``."""
        return f"gradient_bits={self.gradient_bits}"


DOREFA = Scheme(
    name="dorefa",
    title="DoReFa-Net",
    reference="Zhou et al., DoReFa-Net: Training Low Bitwidth Convolutional Neural Networks with Low Bitwidth "
    "Gradients, 2016, arXiv:1606.06160",
    weight=DorefaWeight,
    activation=DorefaActivation,
    output=GradientQuantizer,
)


@hookimpl
def bonn_qat_schemes() -> Iterable[Scheme]:
    """Offer ``dorefa``."""
    yield DOREFA
