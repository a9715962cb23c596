"""XNOR-Net (Rastegari et al., ECCV 2016, arXiv:1603.05279): one scale for each output filter.

W latent weights ``(O, I, kh, kw)`` or ``(O, I)``; alpha ``(O, 1, ...)``; n the elements of one filter;
G the gradient of the binarized weights; I inputs ``(B, C, H, W)``, A the mean of ``|I|`` over their channels.
"""

from collections.abc import Iterable
from typing import Literal, final

import torch
from torch import Tensor

from bonn_qat import BonnQatError, Scheme, hookimpl
from bonn_qat.functional import sign, ste_sign
from bonn_qat.quantizers import ActivationQuantizer, Estimator, WeightQuantizer, sign_activation


def _check_bool(option: str, value: bool) -> None:
    if value not in (True, False):
        raise BonnQatError(f"the option {option} of XNOR-Net must be true or false; got {value!r}")


@final
class XnorWeight(WeightQuantizer):
    """``alpha * sign(W)`` with ``alpha = mean|W|`` over each output filter (the paper's (6)).

    Backward, by ``gradient``:

    - ``"exact"``: ``sign(W_i)/n sum_j G_j sign(W_j) + alpha G_i [|W_i| <= 1]``, the estimator's derivative with
      alpha a function of W;
    - ``"printed"``: ``(1/n + alpha [|W_i| <= 1]) G_i``, as the paper prints it, without the sum; the authors' Lua code
      has the mask ``[|W_i| < 1]``, and differs at exactly 1, where the option ``centre`` puts what it clamps;
    - ``"plain"``: ``alpha G_i [|W_i| <= 1]``, alpha a constant;
    - ``"straight"``: ``G_i``, as the paper's Algorithm 1 updates W.

    ``centre`` does after each step what the authors' code does before the next: from W its mean over the input channels
    is subtracted, then W is clamped to [-1, 1]. With a single input channel W is only clamped. That code's further
    factors of the gradient, ``1 - 1/I`` and n, are not part of this.

    Raises BonnQatError for another ``gradient``, or a ``centre`` that is not a bool.
    """

    def __init__(
        self,
        weight: Tensor,
        *,
        gradient: Literal["exact", "printed", "plain", "straight"] = "exact",
        centre: bool = False,
    ) -> None:
        super().__init__()
        if gradient not in ("exact", "printed", "plain", "straight"):
            raise BonnQatError(
                "the option gradient of XNOR-Net's weights must be 'exact', 'printed', 'plain' or 'straight'; "
                f"got {gradient!r}"
            )
        _check_bool("centre", centre)
        self.gradient, self.centre = gradient, centre

    @torch.no_grad()
    def constrain(self, weight: Tensor) -> None:
        """Centre and clamp W in place, if the option ``centre`` is on."""
        if self.centre:
            if weight.shape[1] > 1:
                weight.sub_(weight.mean(1, keepdim=True))
            weight.clamp_(-1, 1)

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """W -> (alpha sign(W), alpha)."""
        # abs() has the derivative 0 at 0; with sign(0) = +1 it is +1.
        alpha = (x * sign(x.detach())).mean(tuple(range(1, x.ndim)), keepdim=True)
        scale = alpha.detach()
        if self.gradient == "exact":
            return alpha * ste_sign(x), scale
        identity = x - x.detach()  # exactly 0, so that no value is rounded, with the derivative 1
        if self.gradient == "straight":
            return scale * sign(x.detach()) + identity, scale
        value = scale * ste_sign(x)
        return (value + identity / x[0].numel() if self.gradient == "printed" else value), scale

    def extra_repr(self) -> str:
        """The options, for ``print(model)``."""
        return f"gradient={self.gradient!r}, centre={self.centre}"


@final
class XnorSign(ActivationQuantizer):
    """``sign`` forward, clipped straight-through backward ``dy * [|I| <= clip]``; I ``(B, C, ...)``.

    Another ``estimator`` than that of the paper, ``"ste_sign"``, is ``"approx_sign"`` or ``"swish_sign"``, as in
    :func:`bonn_qat.quantizers.sign_activation`.

    With ``input_scale`` the scale is the map A ``(B, 1, H, W)``, and the layer multiplies the convolution's result by
    ``K = A * k``, the mean of A over each window of the kernel, zeros of the padding included (the paper's (11),
    ``(sign(I) * sign(W)) K alpha``). A is a constant of the backward pass: the paper gives a derivative for the sign
    only, and the implementations that have K do not differentiate it. Inputs ``(B, C)`` have no map: their scale is 1.

    The authors' released code leaves K out, as does the default here; it zeroes the gradient at ``|I| = 1``, too.
    Raises BonnQatError for what :func:`~bonn_qat.quantizers.sign_activation` refuses, and an ``input_scale`` that is
    not a bool.
    """

    def __init__(
        self,
        channels: int = 1,
        *,
        clip: float = 1.0,
        estimator: Literal["ste_sign", "approx_sign", "swish_sign"] = "ste_sign",
        input_scale: bool = False,
    ) -> None:
        super().__init__(channels)
        _check_bool("input_scale", input_scale)
        self.sign = sign_activation(channels, estimator=estimator, clip=clip)
        self.input_scale = input_scale
        self.is_pure = not input_scale

    def estimator(self) -> Estimator | None:
        """That of the sign, unless the scale is a map."""
        return None if self.input_scale else self.sign.estimator()

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """I -> (sign(I), A), or (sign(I), 1)."""
        value, one = self.sign.quantize(x)
        return value, x.detach().abs().mean(1, keepdim=True) if self.input_scale and x.ndim == 4 else one

    def extra_repr(self) -> str:
        """The option of its own, for ``print(model)``."""
        return f"input_scale={self.input_scale}"


XNOR = Scheme(
    name="xnor",
    title="XNOR-Net",
    reference="Rastegari et al., XNOR-Net: ImageNet Classification Using Binary Convolutional Neural Networks, "
    "ECCV 2016, arXiv:1603.05279",
    weight=XnorWeight,
    activation=XnorSign,
)


@hookimpl
def bonn_qat_schemes() -> Iterable[Scheme]:
    """Offer ``xnor``."""
    yield XNOR
