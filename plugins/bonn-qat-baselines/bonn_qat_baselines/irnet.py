"""IR-Net (Qin et al., CVPR 2020, arXiv:1909.10788): standardized weights and a sign whose backward sharpens.

W latent weights ``(O, I, kh, kw)`` or ``(O, I)``; W_std the same with mean 0 and standard deviation 1 in each output
filter; 2^s the filters' scales ``(O, 1, ...)``; n the elements of a filter; t a scalar, the sharpness of the error
decay estimator (EDE); G the gradient of what is binarized.
"""

import math
from collections.abc import Iterable
from typing import final

import torch
from torch import Tensor, nn

from bonn_qat import BonnQatError, Scheme, hookimpl
from bonn_qat.functional import ede_sign, power_of_two
from bonn_qat.quantizers import ActivationQuantizer, WeightQuantizer


def mean_between(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """The mean over ``axes``, which are kept, and never beyond the elements.

    The rounded mean of equal numbers may differ from them; their spread would then consist of rounding errors.

    >>> mean_between(torch.full((1, 3), 0.1), (1,)).item() == torch.tensor(0.1).item()
    True
    """
    return x.mean(axes, keepdim=True).clamp(x.amin(axes, keepdim=True), x.amax(axes, keepdim=True))


@final
class ErrorDecaySign(nn.Module):
    """``sign(x)`` with the error decay estimator, which approaches the derivative of the sign during training.

    Backward: ``G k t (1 - tanh(t x)^2)`` with ``k = max(1 / t, 1)`` (:func:`bonn_qat.functional.ede_sign`). t is
    ``t_min (t_max / t_min)^progress``, set by :meth:`advance`; it starts at ``t_min`` and is in no state dict.

    ``scheme`` is the name for error messages. Raises BonnQatError unless ``0 < t_min <= t_max``, both finite.
    """

    t: Tensor

    def __init__(self, scheme: str, t_min: float, t_max: float) -> None:
        super().__init__()
        if not 0 < t_min <= t_max < math.inf:
            raise BonnQatError(
                f"the options t_min and t_max of the scheme {scheme!r} must be finite, with 0 < t_min <= t_max; "
                f"got t_min={t_min} and t_max={t_max}"
            )
        self.t_min, self.t_max = t_min, t_max
        self.register_buffer("t", torch.tensor(float(t_min)), persistent=False)

    def advance(self, progress: float) -> None:
        """Set t; ``progress`` is the part of the training that is done."""
        self.t.fill_(self.t_min * (self.t_max / self.t_min) ** progress)

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> the same shape."""
        return ede_sign(x, self.t)

    def extra_repr(self) -> str:
        """The options, for ``print(model)``."""
        return f"t_min={self.t_min}, t_max={self.t_max}"


@final
class IrNetWeight(WeightQuantizer):
    """``2^s sign(W_std)`` with ``W_std = (W - mean) / std`` and ``s = round(log2 mean|W_std|)`` in each output filter.

    std is the sample's, with n - 1. Backward, s a constant: ``H = 2^s G k t (1 - tanh(t W_std)^2)`` to W_std, and
    ``(H - mean(H) - W_std sum(H W_std) / (n - 1)) / std`` to W, the mean and std being functions of W.

    A filter of equal weights, such as one with a single element, has no std, and one below about ``tiny ** 0.75``,
    3e-29 in float32, counts as none, because the gradient would overflow. Such a filter has the signs of ``W - mean``,
    which are +1 for equal weights, the scale 1, which is about that of every other filter, and the gradient that the
    formulas give for std = 1. Other filters are not affected.

    ``t_min`` and ``t_max`` are the paper's; the authors' code for ResNet-20 with both binary has ``t_min`` 0.001.
    Raises BonnQatError unless ``0 < t_min <= t_max``, both finite.
    """

    def __init__(self, weight: Tensor, *, t_min: float = 0.1, t_max: float = 10.0) -> None:
        super().__init__()
        self.sign = ErrorDecaySign("irnet", t_min, t_max).to(weight)
        self.advance(0.0)  # in the precision of the weights

    def advance(self, progress: float) -> None:
        """Sharpen the estimator."""
        self.sign.advance(progress)

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """W -> (2^s sign(W_std), 2^s)."""
        axes = tuple(range(1, x.ndim))
        least = torch.finfo(x.dtype).tiny ** 0.5
        unit = power_of_two(x.detach().abs().amax(axes, keepdim=True)).clamp(min=least)
        centred = x - mean_between(x, axes)
        variance = (centred / unit).square().sum(axes, keepdim=True) / max(math.prod(x.shape[1:]) - 1, 1)
        has_std = variance >= least
        standardized = centred / torch.where(has_std, unit * torch.where(has_std, variance, 1.0).sqrt(), 1.0)
        magnitude = standardized.detach().abs().mean(axes, keepdim=True)
        scale = torch.where(has_std, magnitude, 1.0).log2().round().exp2()
        return scale * self.sign(standardized), scale


@final
class IrNetActivation(ActivationQuantizer):
    """``sign(x)``; backward ``G k t (1 - tanh(t x)^2)``, with the t of the weights.

    Raises BonnQatError unless ``0 < t_min <= t_max``, both finite.
    """

    is_pure = True

    def __init__(self, channels: int = 1, *, t_min: float = 0.1, t_max: float = 10.0) -> None:
        super().__init__(channels)
        self.sign = ErrorDecaySign("irnet", t_min, t_max)

    def advance(self, progress: float) -> None:
        """Sharpen the estimator."""
        self.sign.advance(progress)

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``x`` -> (signs, 1)."""
        return self.sign(x), x.new_ones(())


IRNET = Scheme(
    name="irnet",
    title="IR-Net",
    reference="Qin et al., Forward and Backward Information Retention for Accurate Binary Neural Networks, "
    "CVPR 2020, arXiv:1909.10788",
    weight=IrNetWeight,
    activation=IrNetActivation,
    norm_position="after_conv",
)


@hookimpl
def bonn_qat_schemes() -> Iterable[Scheme]:
    """Offer ``irnet``."""
    yield IRNET
