"""PCNN (Gu et al., AAAI 2019, arXiv:1811.12755): binary kernels as a learned projection of the latent ones.

Equation numbers are those of the authors' book (Zhang et al., Binary Neural Networks, chapter 3). C latent
kernels ``(O, I, kh, kw)`` or ``(O, I)``; W projection ``(J, 1, kh, kw)`` or ``(J, 1)``, one matrix for all
planes of the layer's kernels; C^ projected kernels; G the gradient of C^ by the task's loss. Here J = 1.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, cast, final

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bonn_qat import BonnQatError, Scheme, hookimpl
from bonn_qat.functional import sign
from bonn_qat.quantizers import ParameterRule, SteSign, WeightQuantizer


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, latent: Tensor, projection: Tensor, scale: Tensor, weight: float, look_ahead: float
    ) -> Tensor:
        projected = scale * sign(projection.mean() * latent)  # (3.29)
        ctx.save_for_backward(latent, projection, projected)
        ctx.weight, ctx.look_ahead = weight, look_ahead
        return projected

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        latent, projection, projected = ctx.saved_tensors
        inside = grad * ((projection * latent).abs() <= 1)
        ahead = latent + ctx.look_ahead * grad
        error = ctx.weight * (projection * ahead - projected)
        dlatent = (inside + error) * projection  # (3.51) + (3.52)
        dprojection = inside * latent + error * ahead  # (3.55) + (3.56)
        return dlatent, dprojection.sum_to_size(projection.shape), None, None, None


@final
class PcnnWeight(WeightQuantizer):
    """``C^ = a sign(mean(W) C)`` with ``a = mean|C|`` over the layer; W is ``projection`` and starts at 1.

    Backward, with lambda = ``projection_weight``, eta = ``look_ahead`` and ``E = W (C + eta G) - C^``:
    ``G [|W C| <= 1] W + lambda E W`` to C (3.51, 3.52), and the sum over all planes of
    ``G [|W C| <= 1] C + lambda E (C + eta G)`` to W (3.55, 3.56).

    The terms with lambda are the gradient of the projection loss ``L_P = lambda/2 ||C^ - W (C + eta G)||^2``
    (3.42). G is known in the backward pass only, so L_P enters here, by its gradient, and is in no loss that
    is logged. Each backward pass adds it once, whatever the loss was multiplied by: with gradients
    accumulated over n batches it counts n times, and G stands in it as it arrives, scaled by a GradScaler.

    The paper's eta is the learning rate, held constant. So is ``look_ahead``: it follows no schedule. What it
    changes in the gradient is of the order ``lambda eta G``, a millionth with the defaults; 0 leaves it out.

    Raises BonnQatError for an option below 0 or not finite.
    """

    parameter_rules: ClassVar[Mapping[str, ParameterRule]] = {"projection": ParameterRule(slow=True)}

    def __init__(self, weight: Tensor, *, projection_weight: float = 1e-4, look_ahead: float = 0.01) -> None:
        super().__init__()
        for option, value in (("projection_weight", projection_weight), ("look_ahead", look_ahead)):
            if not (math.isfinite(value) and value >= 0):
                raise BonnQatError(f"the option {option} of the scheme 'pcnn' is at least 0; got {value}")
        self.projection_weight, self.look_ahead = projection_weight, look_ahead
        self.projection = nn.Parameter(weight.new_ones(1, 1, *weight.shape[2:]))

    @torch.no_grad()
    def adopt(self, weight: Tensor) -> None:
        """Start from W = 1, which a = mean|C| asks for, whatever the float weights are."""
        self.projection.fill_(1)

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """C -> (C^, a)."""
        scale = x.detach().abs().mean()
        value = _Project.apply(x, self.projection, scale, self.projection_weight, self.look_ahead)
        return cast(Tensor, value), scale

    def extra_repr(self) -> str:
        """The options, for ``print(model)``."""
        return f"projection_weight={self.projection_weight}, look_ahead={self.look_ahead}"


PCNN = Scheme(
    name="pcnn",
    title="PCNN",
    reference="Gu et al., Projection Convolutional Neural Networks for 1-bit CNNs via Discrete Back Propagation, "
    "AAAI 2019, arXiv:1811.12755",
    weight=PcnnWeight,
    activation=SteSign,
)


@hookimpl
def bonn_qat_schemes() -> Iterable[Scheme]:
    """Offer ``pcnn``."""
    yield PCNN
