"""XNOR-Net (Rastegari et al., ECCV 2016, arXiv:1603.05279): one scale for each output filter.

W latent weights ``(O, I, kh, kw)`` or ``(O, I)``; alpha ``(O, 1, ...)``; n the elements of one filter;
G the gradient of the binarized weights.
"""

from collections.abc import Iterable
from typing import Literal, final

from torch import Tensor

from bonn_qat import BonnQatError, Scheme, hookimpl
from bonn_qat.functional import sign, ste_sign
from bonn_qat.quantizers import SteSign, WeightQuantizer


@final
class XnorWeight(WeightQuantizer):
    """``alpha * sign(W)`` with ``alpha = mean|W|`` over each output filter (the paper's (6)).

    Backward with ``gradient="exact"``: ``sign(W_i)/n sum_j G_j sign(W_j) + alpha G_i [|W_i| <= 1]``, the
    estimator's derivative with alpha a function of W; the paper prints its first term without the sum.
    With ``gradient="plain"`` alpha is a constant: ``alpha G_i [|W_i| <= 1]``.

    The centring and clamping of W in the authors' code are not part of this, nor is the input scale K,
    which that code leaves out too. Raises BonnQatError for another ``gradient``.
    """

    def __init__(self, weight: Tensor, *, gradient: Literal["exact", "plain"] = "exact") -> None:
        super().__init__()
        if gradient not in ("exact", "plain"):
            raise BonnQatError(f"the option gradient of the scheme 'xnor' is 'exact' or 'plain'; got {gradient!r}")
        self.gradient = gradient

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """W -> (alpha sign(W), alpha)."""
        # abs() has the derivative 0 at 0; with sign(0) = +1 it is +1.
        magnitude = x * sign(x.detach())
        alpha = magnitude.mean(tuple(range(1, x.ndim)), keepdim=True)
        if self.gradient == "plain":
            alpha = alpha.detach()
        return alpha * ste_sign(x), alpha.detach()

    def extra_repr(self) -> str:
        """The option, for ``print(model)``."""
        return f"gradient={self.gradient!r}"


XNOR = Scheme(
    name="xnor",
    title="XNOR-Net",
    reference="Rastegari et al., XNOR-Net: ImageNet Classification Using Binary Convolutional Neural Networks, "
    "ECCV 2016, arXiv:1603.05279",
    weight=XnorWeight,
    activation=SteSign,
)


@hookimpl
def bonn_qat_schemes() -> Iterable[Scheme]:
    """Offer ``xnor``."""
    yield XNOR
