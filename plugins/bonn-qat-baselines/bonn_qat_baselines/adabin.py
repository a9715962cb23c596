"""AdaBin (Tu et al., ECCV 2022, arXiv:2208.08084): two learned values for each filter and for the inputs of each layer.

W latent weights ``(O, I, kh, kw)`` or ``(O, I)``; beta and alpha the centre and half the distance of a filter's two
values, each ``(O, 1, ...)``; n the elements of a filter; x inputs ``(B, C, H, W)`` or ``(B, C)``; a and b the same of
a layer's inputs, scalars; p and q ``(C,)``; G the gradient of the output.

Convolutions are padded with zeros, which are neither of the two values of their input, as in the authors' code.
"""

from collections.abc import Iterable
from typing import Literal, final

import torch
from torch import Tensor, nn

from bonn_qat import BonnQatError, Scheme, hookimpl
from bonn_qat.functional import approx_sign, power_of_two
from bonn_qat.quantizers import ActivationQuantizer, WeightQuantizer
from bonn_qat_baselines.irnet import ErrorDecaySign, mean_between


@final
class AdaBinWeight(WeightQuantizer):
    """``alpha S(u) + beta`` with ``u = (W - beta) / alpha`` and S the sign, in each output filter.

    beta is the filter's mean, ``alpha = ||W - beta|| / sqrt(n)``. Backward, both being functions of W, with
    ``S'(u) = k t (1 - tanh(t u)^2)``, the error decay estimator, and ``D = G S'(u)``:
    ``D + mean(G - D) + u mean(G S(u) - D u)``, means over the filter.

    A filter of equal weights keeps both values at beta: alpha is at least ``tiny ** 0.75``, 3e-29 in float32, so that u
    is 0 there and the gradient finite.

    t grows by equal factors from ``t_min`` to ``t_max`` (:class:`~bonn_qat_baselines.irnet.ErrorDecaySign`), from 0.001
    to 10 as in both training scripts of the authors. Their CIFAR program without its option ``--progressive``, which
    their script sets, stays at t = 0.1 and k = 10: that is ``t_min=0.1, t_max=0.1``.
    Raises BonnQatError unless ``0 < t_min <= t_max``, both finite.
    """

    scaled_sign = False

    def __init__(self, weight: Tensor, *, t_min: float = 0.001, t_max: float = 10.0) -> None:
        super().__init__()
        self.sign = ErrorDecaySign("adabin", t_min, t_max).to(weight)
        self.advance(0.0)  # in the precision of the weights

    def advance(self, progress: float) -> None:
        """Sharpen the estimator."""
        self.sign.advance(progress)

    def constants(self, weight: Tensor) -> int:
        """alpha and beta of each filter."""
        return 2 * weight.shape[0]

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """W -> (alpha S(u) + beta, alpha)."""
        axes = tuple(range(1, x.ndim))
        tiny = torch.finfo(x.dtype).tiny
        unit = power_of_two(x.detach().abs().amax(axes, keepdim=True)).clamp(min=tiny**0.5)
        beta = mean_between(x, axes)
        centred = x - beta
        variance = (centred / unit).square().mean(axes, keepdim=True)
        alpha = (unit * torch.where(variance > 0, variance, tiny).sqrt()).clamp(min=tiny**0.75)
        alpha = torch.where(variance > 0, alpha, tiny**0.75)
        return alpha * self.sign(centred / alpha) + beta, alpha.detach()


@final
class AdaBinActivation(ActivationQuantizer):
    """``a S(u) + b`` with ``u = (x - b) / a`` and S the sign; a and b are learned, 1 and 0 at the start.

    Backward, with ``S'(u) = max(0, 2 - 2|u|)`` (:func:`bonn_qat.functional.approx_sign`): ``G S'(u)`` to x, the sum of
    ``G (S(u) - u S'(u))`` to a and of ``G (1 - S'(u))`` to b. ``centre="code"`` is the authors' code, whose values are
    ``a (S(u) + b)``: then the sum of ``G (S(u) + b - u S'(u))`` to a and of ``G (a - S'(u))`` to b. In the division
    ``|a|`` is at least one rounding step of 1, because a may pass through 0.
    Raises BonnQatError for another ``centre``.
    """

    is_pure = True

    def __init__(self, channels: int = 1, *, centre: Literal["paper", "code"] = "paper") -> None:
        super().__init__(channels)
        if centre not in ("paper", "code"):
            raise BonnQatError(f"the option centre of the scheme 'adabin' must be 'paper' or 'code'; got {centre!r}")
        self.centre = centre
        self.a, self.b = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(()))

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``x`` -> (a S(u) + b, a)."""
        least = torch.finfo(x.dtype).eps
        signs = approx_sign((x - self.b) / torch.where(self.a.abs() < least, least, self.a))
        value = self.a * signs + self.b if self.centre == "paper" else self.a * (signs + self.b)
        return value, self.a.detach()

    def extra_repr(self) -> str:
        """The option, for ``print(model)``."""
        return f"centre={self.centre!r}"


@final
class Maxout(nn.Module):
    """``p relu(x) - q relu(-x)`` with a learned slope on either side for each channel, 1 and 1/4 at the start.

    Backward: ``p G`` to x where ``x > 0``, ``q G`` where ``x < 0``, none where x = 0; to p the sum of ``G x`` over the
    first, to q over the second.
    """

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        self.p, self.q = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.full((channels,), 0.25))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, ...)`` -> the same shape and dtype."""
        return _along_channels(self.p, x) * torch.relu(x) - _along_channels(self.q, x) * torch.relu(-x)


@torch.fx.wrap  # it needs the number of axes, which torch.fx does not know
def _along_channels(slope: Tensor, x: Tensor) -> Tensor:
    return slope.to(x.dtype).reshape(-1, *[1] * (x.ndim - 2))


ADABIN = Scheme(
    name="adabin",
    title="AdaBin",
    reference="Tu et al., AdaBin: Improving Binary Neural Networks with Adaptive Binary Sets, ECCV 2022, "
    "arXiv:2208.08084",
    weight=AdaBinWeight,
    activation=AdaBinActivation,
    nonlinearity=Maxout,
    norm_position="after_conv",
)


@hookimpl
def bonn_qat_schemes() -> Iterable[Scheme]:
    """Offer ``adabin``."""
    yield ADABIN
