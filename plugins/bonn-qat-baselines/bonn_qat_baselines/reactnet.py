"""ReActNet (Liu et al., ECCV 2020, arXiv:2003.03488): signs and PReLUs whose thresholds are learned.

x inputs ``(B, C, H, W)`` or ``(B, C)``; a the thresholds of the sign, gamma and zeta the shifts before and after the
PReLU, slope its own, each ``(C,)``; G the gradient of the output. Weights are those of Bi-Real Net.

The other two parts of the paper concern the training, and are settings of a recipe: two stages, the first with
``weights="float"`` and binary activations, and distillation from a float teacher for the distribution loss.
"""

import functools
from collections.abc import Iterable
from typing import final

import torch
from torch import Tensor, nn

from bonn_qat import Scheme, hookimpl
from bonn_qat.functional import approx_sign, prelu
from bonn_qat.quantizers import ActivationQuantizer, Estimator
from bonn_qat_baselines.bireal import BiRealWeight


@torch.fx.wrap  # it needs the number of axes, which torch.fx does not know
def _along_channels(parameter: Tensor, x: Tensor) -> Tensor:
    return parameter.reshape(-1, *[1] * (x.ndim - 2))


@final
class RSign(ActivationQuantizer):
    """+1 where ``x >= a``, else -1, with a learned ``threshold`` a for each channel, 0 at the start.

    Backward, with u = x - a: ``dx = G max(0, 2 - 2|u|)`` (:func:`bonn_qat.functional.approx_sign`), and for a the sum
    of ``-dx`` over all axes but the channel's. Where the channels are unknown, ``channels`` is 1 and all share one a.
    """

    is_pure = True

    def __init__(self, channels: int = 1) -> None:
        super().__init__(channels)
        self.threshold = nn.Parameter(torch.zeros(channels))

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``x`` -> (signs of ``x - a``, 1)."""
        return approx_sign(x - _along_channels(self.threshold, x)), x.new_ones(())

    def estimator(self) -> Estimator:
        """A parabola around the threshold."""
        return Estimator(parabola=True, threshold=self.threshold)


@final
class RPReLU(nn.Module):
    """``PReLU(x - gamma) + zeta``: a PReLU whose corner moves, in both directions, for each channel.

    ``x - gamma + zeta`` where ``x > gamma``, else ``slope (x - gamma) + zeta``. Backward: G or ``slope G`` to x, minus
    its sum over all axes but the channel's to gamma, the sum of G to zeta, and the sum of ``G (x - gamma)`` over
    ``x <= gamma`` to slope. At the start gamma = zeta = 0 and slope = 1/4, which is torch's PReLU.
    """

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        self.gamma, self.zeta = (nn.Parameter(torch.zeros(channels)) for _ in range(2))
        self.slope = nn.Parameter(torch.full((channels,), 0.25))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, ...)`` -> the same shape and dtype."""
        return prelu(x, self.slope, self.gamma, self.zeta)


REACTNET = Scheme(
    name="reactnet",
    title="ReActNet",
    reference="Liu et al., ReActNet: Towards Precise Binary Neural Network with Generalized Activation Functions, "
    "ECCV 2020, arXiv:2003.03488",
    weight=functools.partial(BiRealWeight, gradient="clipped"),  # as the authors' code has it
    activation=RSign,
    nonlinearity=RPReLU,
    norm_position="after_conv",
)


@hookimpl
def bonn_qat_schemes() -> Iterable[Scheme]:
    """Offer ``reactnet``."""
    yield REACTNET
