"""PCNN (Gu et al., AAAI 2019, arXiv:1811.12755): binary kernels as a learned projection of the latent ones.

Equation numbers are those of the authors' book (Zhang et al., Binary Neural Networks, chapter 3). C latent
kernels ``(O, I, kh, kw)`` or ``(O, I)``; W projection ``(J, 1, kh, kw)`` or ``(J, 1)``, one matrix for all
planes of the layer's kernels; C^_j projected kernels; G the gradient of what convolves by the task's loss.

The paper's feature maps have J channels each, one for each C^_j (3.45 to 3.48). So that a network keeps its shapes,
here a kernel is the mean of its J projections, whose gradients are G_j = G / J. The paper's ImageNet network has J = 1.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal, cast, final

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bonn_qat import BonnQatError, Scheme, hookimpl
from bonn_qat.functional import sign, summed_to
from bonn_qat.quantizers import ParameterRule, WeightQuantizer, sign_activation


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, latent: Tensor, projections: Tensor, scale: Tensor, weight: float, look_ahead: float
    ) -> Tensor:
        ctx.save_for_backward(latent, projections, scale)
        ctx.weight, ctx.look_ahead = weight, look_ahead
        return scale * torch.stack([sign(w.mean() * latent) for w in torch.split(projections, 1)]).mean(0)  # (3.29)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        latent, projections, scale = ctx.saved_tensors
        grad = grad / len(projections)
        ahead = latent + ctx.look_ahead * grad
        dlatents, dprojections, bound = [], [], torch.finfo(latent.dtype).max / latent.numel()
        for w in torch.split(projections, 1):
            inside = grad * ((w * latent).abs() <= 1)
            error = ctx.weight * (w * ahead - scale * sign(w.mean() * latent))
            dlatents.append((inside + error) * w)  # (3.51) + (3.52)
            # A product of latents beyond the square root of the largest number would be infinite, and NaN in a sum.
            product = (error * ahead).clamp_(-bound, bound)
            dprojections.append(summed_to(inside * latent + product, w.shape))  # (3.55) + (3.56)
        return torch.stack(dlatents).sum(0), torch.cat(dprojections), None, None, None


@final
class PcnnWeight(WeightQuantizer):
    """The mean of J kernels ``C^_j = a sign(mean(W_j) C)`` with ``a = mean|C|`` over the layer; W is ``projection``.

    With ``magnitude="norm"`` a is (3.57) taken literally, the mean over the kernels of the sum of ``|C_i|``.

    Backward, with lambda = ``projection_weight``, eta = ``look_ahead``, ``G_j = G / J`` and
    ``E_j = W_j (C + eta G_j) - C^_j``: the sum over j of ``G_j [|W_j C| <= 1] W_j + lambda E_j W_j`` to C (3.51, 3.52),
    and the sum over all planes of ``G_j [|W_j C| <= 1] C + lambda E_j (C + eta G_j)`` to W_j (3.55, 3.56).

    J is ``projections``. One W starts at 1, which matches ``a = mean|C|``. Several equal W would get equal gradients
    and stay equal, so they start evenly spaced within (0.5, 1.5), ``1 + (j - (J - 1) / 2) / J`` for j from 0. The paper
    starts its W at random and does not say how: ``start="random"`` draws every element from [0.5, 1.5). A deployed
    layer keeps J bits for each weight, and a.

    The terms with lambda are the gradient of the projection loss (3.42),
    ``L_P = lambda/2 sum_j ||C^_j - W_j (C + eta G_j)||^2``. G is known only in the backward pass, so L_P is added
    there, as a gradient, and no logged loss contains it. Each backward pass adds it once, whatever the loss was
    multiplied by: with gradients accumulated over n batches it counts n times, and it uses G as scaled by a GradScaler.

    The paper's eta is the learning rate, held constant. So is ``look_ahead``: it follows no schedule. What it
    changes in the gradient is of the order ``lambda eta G``, a millionth with the defaults; 0 leaves it out.

    Raises BonnQatError for ``projections`` below 1, ``projection_weight`` and ``look_ahead`` below 0 or not finite, and
    another ``start`` or ``magnitude``.
    """

    parameter_rules: ClassVar[Mapping[str, ParameterRule]] = {"projection": ParameterRule(slow=True)}

    def __init__(
        self,
        weight: Tensor,
        *,
        projection_weight: float = 1e-4,
        look_ahead: float = 0.01,
        projections: int = 1,
        start: Literal["one", "random"] = "one",
        magnitude: Literal["mean", "norm"] = "mean",
    ) -> None:
        super().__init__()
        if not isinstance(projections, int) or projections < 1:
            raise BonnQatError(
                f"the option projections of the scheme 'pcnn' must be a whole number, at least 1; got {projections!r}"
            )
        for option, value in (("projection_weight", projection_weight), ("look_ahead", look_ahead)):
            if not (math.isfinite(value) and value >= 0):
                raise BonnQatError(f"the option {option} of the scheme 'pcnn' must be at least 0; got {value}")
        for option, name, allowed in (("start", start, ("one", "random")), ("magnitude", magnitude, ("mean", "norm"))):
            if name not in allowed:
                words = " or ".join(map(repr, allowed))
                raise BonnQatError(f"the option {option} of the scheme 'pcnn' must be {words}; got {name!r}")
        self.projection_weight, self.look_ahead = projection_weight, look_ahead
        self.start, self.magnitude = start, magnitude
        self.bits, self.scaled_sign = projections, projections == 1
        self.projection = nn.Parameter(weight.new_empty(projections, 1, *weight.shape[2:]))
        self.adopt(weight)

    @torch.no_grad()
    def adopt(self, weight: Tensor) -> None:
        """Start from W about 1, which matches a = mean|C|, whatever the float weights are."""
        if self.start == "random":
            self.projection.uniform_(0.5, 1.5)
            return
        for j, w in enumerate(self.projection):
            w.fill_(1 + (j - (self.bits - 1) / 2) / self.bits)

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """C -> (the mean of the C^_j, a)."""
        scale = x.detach().abs().mean()
        if self.magnitude == "norm":
            scale = scale * x[0].numel()
        value = _Project.apply(x, self.projection, scale, self.projection_weight, self.look_ahead)
        return cast(Tensor, value), scale

    def extra_repr(self) -> str:
        """The options, for ``print(model)``."""
        options = f"projection_weight={self.projection_weight}, look_ahead={self.look_ahead}"
        return f"{options}, projections={self.bits}, start={self.start!r}, magnitude={self.magnitude!r}"


PCNN = Scheme(
    name="pcnn",
    title="PCNN",
    reference="Gu et al., Projection Convolutional Neural Networks for 1-bit CNNs via Discrete Back Propagation, "
    "AAAI 2019, arXiv:1811.12755",
    weight=PcnnWeight,
    activation=sign_activation,
)


@hookimpl
def bonn_qat_schemes() -> Iterable[Scheme]:
    """Offer ``pcnn``."""
    yield PCNN
