"""BNN (Courbariaux, Hubara et al., 2016, arXiv:1602.02830): weights and activations are plain signs, without a scale.

W latent weights ``(O, I, kh, kw)`` or ``(O, I)``, kept within [-1, 1]; G the gradient of the binarized weights;
x activations ``(B, C, ...)``.

This file has the quantizers of the paper, but not the rest of the authors' Theano recipe: learning rates scaled by
Glorot's initialization, the squared hinge loss, shift-based batch norm and AdaMax.
"""

import math
from collections.abc import Iterable
from typing import Literal, final

import torch
from torch import Tensor

from bonn_qat import BonnQatError, Scheme, hookimpl
from bonn_qat.functional import ste_sign
from bonn_qat.quantizers import ActivationQuantizer, Estimator, WeightQuantizer


@final
class BnnWeight(WeightQuantizer):
    """``sign(W)``; the scale is 1, ``()``, and a deployed layer stores none.

    Backward: ``G`` with ``gradient="straight"``, ``G [|W| <= 1]`` with ``gradient="clipped"``. Because each step ends
    with W in [-1, 1], the two can differ only in the first step. Raises BonnQatError for another ``gradient``.
    """

    def __init__(self, weight: Tensor, *, gradient: Literal["straight", "clipped"] = "straight") -> None:
        super().__init__()
        if gradient not in ("straight", "clipped"):
            raise BonnQatError(
                f"the option gradient of the scheme 'bnn' must be 'straight' or 'clipped'; got {gradient!r}"
            )
        self.gradient = gradient

    @torch.no_grad()
    def constrain(self, weight: Tensor) -> None:
        """Clip W to [-1, 1], in place: a larger weight would grow without ever changing its sign."""
        weight.clamp_(-1, 1)

    def constants(self, weight: Tensor) -> int:
        """0: there is no scale."""
        return 0

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """W -> (sign(W), 1)."""
        return ste_sign(x, math.inf if self.gradient == "straight" else 1.0), x.new_ones(())

    def extra_repr(self) -> str:
        """The option, for ``print(model)``."""
        return f"gradient={self.gradient!r}"


@final
class BnnSign(ActivationQuantizer):
    """``sign(x)``, or with ``activations="stochastic"`` in training mode a random sign; the scale is 1, ``()``.

    The random sign is +1 with the probability ``clip((x + 1)/2, 0, 1)``, else -1, one draw of torch's global generator
    for each element; its mean is ``clip(x, -1, 1)``. In evaluation mode the sign is deterministic.
    Backward of both: ``dy * [|x| <= 1]``. Raises BonnQatError for other ``activations``.
    """

    def __init__(
        self, channels: int = 1, *, activations: Literal["deterministic", "stochastic"] = "deterministic"
    ) -> None:
        super().__init__(channels)
        if activations not in ("deterministic", "stochastic"):
            raise BonnQatError(
                f"the option activations of the scheme 'bnn' must be 'deterministic' or 'stochastic'; "
                f"got {activations!r}"
            )
        self.activations = activations
        self.is_pure = activations == "deterministic"

    def estimator(self) -> Estimator | None:
        """The clipped one, of deterministic signs."""
        return Estimator() if self.is_pure else None

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x -> (+1 or -1, 1)."""
        value, one = ste_sign(x), x.new_ones(())
        if self.activations == "deterministic" or not self.training:
            return value, one
        plus = torch.rand_like(x) < (x.detach() + 1) / 2  # no clip needed, because the draws are in [0, 1)
        # The difference is exactly 0 and has the derivative of the deterministic sign.
        return 2 * plus.to(x.dtype) - 1 + (value - value.detach()), one

    def extra_repr(self) -> str:
        """The option, for ``print(model)``."""
        return f"activations={self.activations!r}"


BNN = Scheme(
    name="bnn",
    title="BNN",
    reference="Courbariaux et al., Binarized Neural Networks: Training Deep Neural Networks with Weights and "
    "Activations Constrained to +1 or -1, 2016, arXiv:1602.02830 (Hubara et al., NIPS 2016)",
    weight=BnnWeight,
    activation=BnnSign,
)


@hookimpl
def bonn_qat_schemes() -> Iterable[Scheme]:
    """Offer ``bnn``."""
    yield BNN
