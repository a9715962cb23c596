"""ReCU (Xu et al., ICCV 2021, arXiv:2103.12369): latent weights in the tails, whose signs hardly flip, are clamped.

W latent weights ``(O, I, kh, kw)`` or ``(O, I)``; W_1 the standardized ones; Q the bound of the clamp ``()``; tau its
quantile; alpha the filters' scales ``(O,)``; x inputs ``(B, C, H, W)`` or ``(B, C)``; G the gradient of
what is binarized.
"""

import math
from collections.abc import Iterable
from typing import final

import torch
from torch import Tensor, nn

from bonn_qat import BonnQatError, Scheme, hookimpl
from bonn_qat.functional import approx_sign, power_of_two, ste_sign
from bonn_qat.quantizers import ActivationQuantizer, WeightQuantizer
from bonn_qat_baselines.irnet import mean_between

_EPSILON = 1e-5  # of the authors' code, beside both variances


def _deviation(x: Tensor) -> Tensor:
    """``sqrt(var + 1e-5)`` of the sample over all axes but the first, with those axes kept; var is 0 for n = 1."""
    axes, n = tuple(range(1, x.ndim)), math.prod(x.shape[1:])
    unit = power_of_two(x.detach().abs().amax(axes, keepdim=True)).clamp(min=1)
    variance = (x / unit).var(axes, correction=min(n - 1, 1), keepdim=True)
    return (
        unit
        * (variance + _EPSILON / unit / unit)
        .clamp(min=torch.finfo(x.dtype).smallest_normal * torch.finfo(x.dtype).eps)
        .sqrt()
    )


@final
class RecuWeight(WeightQuantizer):
    """``alpha sign(W_2)`` with ``W_2 = clamp(W_1, -Q, Q)`` and a learned alpha for each output filter.

    ``W_1 = 2 sqrt(2) (W - mean) / sqrt(var + 1e-5)`` in each filter, ``Q = -log(2 - 2 tau) mean|W_1|`` over the layer:
    for Laplacian weights the tau-quantile. ``tau = A e^progress + B`` goes from ``tau_min`` to ``tau_max``. Backward, Q
    a constant: ``alpha G`` to W_2, from there where ``|W_1| <= Q`` to W by way of mean and var, and to alpha the sum of
    ``G sign(W_2)`` over the filter. The forward does not depend on tau.

    alpha starts at ``mean|W|`` of the float filter, like the scales of other schemes. In the authors' code it is random
    in [0, 1); the norm after each convolution cancels either, also in its updates but for their size. It decays only
    where norms do (the recipe's ``norm_decay``), as everything does in the authors' code.
    Raises BonnQatError unless ``0.5 < tau_min <= tau_max < 1``.
    """

    bound: Tensor  # Q / mean|W_1|

    def __init__(self, weight: Tensor, *, tau_min: float = 0.85, tau_max: float = 0.99) -> None:
        super().__init__()
        if not 0.5 < tau_min <= tau_max < 1:
            raise BonnQatError(
                "the options tau_min and tau_max of the scheme 'recu' must satisfy 0.5 < tau_min <= tau_max < 1; "
                f"got tau_min={tau_min} and tau_max={tau_max}"
            )
        self.tau_min, self.tau_max = tau_min, tau_max
        self.alpha = nn.Parameter(weight.new_empty(weight.shape[0]))
        self.register_buffer("bound", weight.new_empty(()), persistent=False)
        self.adopt(weight)
        self.advance(0.0)

    @torch.no_grad()
    def adopt(self, weight: Tensor) -> None:
        """Start alpha at the mean magnitude of each filter."""
        self.alpha.copy_(weight.abs().flatten(1).mean(1))

    def advance(self, progress: float) -> None:
        """Let fewer weights be clamped."""
        tau = self.tau_min + (self.tau_max - self.tau_min) * math.expm1(progress) / math.expm1(1)
        self.bound.fill_(-math.log(2 - 2 * tau))

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """W -> (alpha sign(W_2), |alpha|)."""
        centred = x - mean_between(x, tuple(range(1, x.ndim)))
        standardized = centred * (2 * math.sqrt(2)) / _deviation(x)
        magnitude = standardized.detach().abs()
        # A clamp changes no sign, so only its derivative matters; that of torch.clamp is 1/2 at the bound.
        clamped = torch.where(magnitude <= self.bound * magnitude.mean(), standardized, standardized.detach())
        alpha = self.alpha.reshape(-1, *[1] * (x.ndim - 1))
        # A clip of infinity makes the straight-through estimator the identity.
        return alpha * ste_sign(clamped, math.inf), alpha.detach().abs()

    def extra_repr(self) -> str:
        """The options, for ``print(model)``."""
        return f"tau_min={self.tau_min}, tau_max={self.tau_max}"


@final
class RecuActivation(ActivationQuantizer):
    """``sign(u)`` with ``u = x / sqrt(var + 1e-5)``, var that of each sample over C, H and W.

    Backward: ``G max(0, 2 - 2|u|)`` to u and from there to x, var being a function of x. As in the authors' code only
    in training: in evaluation u is x, which has the same sign.
    """

    is_pure = True

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``x`` -> (signs, 1)."""
        return approx_sign(x / _deviation(x) if self.training else x), x.new_ones(())


RECU = Scheme(
    name="recu",
    title="ReCU",
    reference="Xu et al., ReCU: Reviving the Dead Weights in Binary Neural Networks, ICCV 2021, arXiv:2103.12369",
    weight=RecuWeight,
    activation=RecuActivation,
    norm_position="after_conv",
)


@hookimpl
def bonn_qat_schemes() -> Iterable[Scheme]:
    """Offer ``recu``."""
    yield RECU
