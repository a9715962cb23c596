"""Bi-Real Net (Liu et al., ECCV 2018, arXiv:1808.00278): its derivatives of the two signs.

W latent weights ``(O, I, kh, kw)`` or ``(O, I)``; alpha ``(O, 1, ...)``; G the gradient of the binarized weights.
The shortcut around each convolution, the paper's other half, is every scheme's default. ``bireal-staged`` trains as
the authors' pretraining does: a float network with ReLU, then leaky clip, then clip in the place of the signs, then the
binary network, and at the end its norms alone.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any, Literal, cast, final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bonn_qat import BonnQatError, Scheme, Stage, hookimpl
from bonn_qat.functional import magnitude_aware_sign, sign
from bonn_qat.quantizers import ApproxSign, WeightQuantizer


class _ScaledSign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, latent: Tensor, alpha: Tensor) -> Tensor:
        ctx.save_for_backward(latent)
        return alpha * sign(latent)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (latent,) = ctx.saved_tensors
        return grad * (latent.abs() <= 1), None


@final
class BiRealWeight(WeightQuantizer):
    """``alpha * sign(W)`` with ``alpha = mean|W|`` over each output filter, a constant of the backward pass.

    Backward with ``gradient="magnitude"``: ``alpha G [|W| <= 1]``, the paper's magnitude-aware gradient
    ((6), (7)). With ``gradient="clipped"``: ``G [|W| <= 1]``, that of the authors' PyTorch code, which has
    no factor alpha. Raises BonnQatError for another ``gradient``.
    """

    def __init__(self, weight: Tensor, *, gradient: Literal["magnitude", "clipped"] = "magnitude") -> None:
        super().__init__()
        if gradient not in ("magnitude", "clipped"):
            raise BonnQatError(
                f"the option gradient of Bi-Real Net's weights must be 'magnitude' or 'clipped'; got {gradient!r}"
            )
        self.gradient = gradient

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """W -> (alpha sign(W), alpha)."""
        alpha = x.detach().abs().mean(tuple(range(1, x.ndim)), keepdim=True)
        if self.gradient == "magnitude":
            return magnitude_aware_sign(x), alpha
        # Not alpha * sign(W) - clamp(W) + clamp(W): its rounding leaves more than two values.
        return cast(Tensor, _ScaledSign.apply(x, alpha)), alpha

    def extra_repr(self) -> str:
        """The option, for ``print(model)``."""
        return f"gradient={self.gradient!r}"


BIREAL = Scheme(
    name="bireal",
    title="Bi-Real Net",
    reference="Liu et al., Bi-Real Net: Enhancing the Performance of 1-bit CNNs With Improved Representational "
    "Capability and Advanced Training Algorithm, ECCV 2018, arXiv:1808.00278",
    weight=BiRealWeight,
    activation=ApproxSign,
    norm_position="after_conv",
)

# The authors' staged training, with the shares of the epochs ours: they pretrain on ImageNet stage by stage.
STAGED = dataclasses.replace(
    BIREAL,
    name="bireal-staged",
    title="Bi-Real, staged",
    stages=(
        Stage(share=0.3, weights="float", activations="relu"),
        Stage(share=0.1, weights="float", activations="leaky_clip"),
        Stage(share=0.1, weights="float", activations="clip"),
        Stage(share=0.4),
        Stage(share=0.1, trains="norms", recompute_norms=True),
    ),
)


@hookimpl
def bonn_qat_schemes() -> Iterable[Scheme]:
    """Offer ``bireal`` and ``bireal-staged``."""
    yield from (BIREAL, STAGED)
