"""ABC-Net (Lin et al., NIPS 2017, arXiv:1711.11294): weights and activations as sums of M and N binary bases.

W latent weights ``(O, I, kh, kw)`` or ``(O, I)``; B_m its bases, of the same shape; alpha ``(M,)``; R activations
``(B, C, H, W)`` or ``(B, C)``; A_n their bases; v and beta ``(N,)``; G the gradient of the quantized W or R.
"""

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, cast, final

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bonn_qat import BonnQatError, Scheme, hookimpl
from bonn_qat.functional import power_of_two, sign
from bonn_qat.quantizers import ActivationQuantizer, WeightQuantizer

_RIDGE = 1e-8  # beside a diagonal of ones: bases that coincide, or are opposite, make the Gram matrix singular
_SHIFTS: Mapping[int, tuple[float, ...]] = {1: (0.0,), 3: (-1.5, 0.0, 1.5), 5: (-3.5, -2.5, -1.5, 0.0, 2.5)}  # Table S4


def _evenly(count: int, bound: float) -> tuple[float, ...]:
    return tuple(bound * (2 * i - count + 1) / max(count - 1, 1) for i in range(count))


def _check_bases(option: str, count: int) -> None:
    if not isinstance(count, int) or count < 1:
        raise BonnQatError(
            f"the option {option} of the scheme 'abcnet' must be a whole number, at least 1; got {count!r}"
        )


@final
class AbcWeight(WeightQuantizer):
    """``sum_m alpha_m B_m`` with ``B_m = sign(W - mean(W) + u_m std(W))``, mean and std over the layer.

    ``u_m = weight_spread * (-1 + 2 (m - 1) / (M - 1))``, 0 for M = 1; M is ``weight_bases``. The formula is the paper's
    with ``weight_spread=1``; 2 gives the -2 to 2 of Table S4's rows (5, 1) and (5, 3). The paper does not say which
    standard deviation it means; here it is the population's, which a single weight has too. ``centre=False`` leaves the
    mean out, which for M = 1 is the ``sign(W)`` of BWN with one scale for the layer. alpha minimises ``||W - sum_m
    alpha_m B_m||^2`` anew in each forward pass.

    Backward: ``(sum_m alpha_m) G``. Each sign is straight-through without a mask; alpha, mean and std are constants.

    A deployed layer keeps M bits for each weight and the M numbers of alpha. Raises BonnQatError for ``weight_bases``
    below 1 and a ``weight_spread`` that is not a number above 0.
    """

    def __init__(
        self, weight: Tensor, *, weight_bases: int = 1, weight_spread: float = 1.0, centre: bool = True
    ) -> None:
        super().__init__()
        _check_bases("weight_bases", weight_bases)
        if not 0 < weight_spread < math.inf:
            raise BonnQatError(
                f"the option weight_spread of the scheme 'abcnet' must be a number above 0; got {weight_spread!r}"
            )
        self.bits, self.scaled_sign = weight_bases, weight_bases == 1
        self.weight_spread, self.centre = weight_spread, centre

    @torch.no_grad()
    def decompose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """W ``(O, ...)`` -> B ``(M, O, ...)`` of {-1, +1} and alpha ``(M,)``, of the least-squares fit."""
        unit = power_of_two(x.abs().amax())
        std = unit * (x / unit).std(correction=0)
        centred = x - x.mean() if self.centre else x
        bases = torch.stack([sign(centred + u * std) for u in _evenly(self.bits, self.weight_spread)])
        # Of two bases one is nowhere below the other, so the mean of their product follows from their means.
        means = bases.flatten(1).mean(1, dtype=torch.float64)
        gram = 1 - (means[:, None] - means).abs()
        products = (bases * x).flatten(1).mean(1, dtype=torch.float64)
        # inv_ex, because inv would wait for the GPU to report a singular matrix.
        inverse = torch.linalg.inv_ex(gram + _RIDGE * torch.eye(self.bits, dtype=gram.dtype, device=gram.device))[0]
        alpha = inverse @ products
        alpha = alpha + inverse @ (products - gram @ alpha)  # takes back what the ridge changed
        return bases, alpha.to(x.dtype)

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """W -> (sum_m alpha_m B_m, its largest possible magnitude); the magnitude is ``|alpha|`` for M = 1."""
        bases, alpha = self.decompose(x.detach())
        value = (alpha.reshape(-1, *[1] * x.ndim) * bases).sum(0)
        # The difference is exactly 0, so that a layer keeps its few values.
        return value + alpha.sum() * (x - x.detach()), alpha.abs().sum()

    def constants(self, weight: Tensor) -> int:
        """alpha; mean and std are not needed once the bases are known."""
        return self.bits

    def extra_repr(self) -> str:
        """The options, for ``print(model)``."""
        return f"weight_bases={self.bits}, weight_spread={self.weight_spread}, centre={self.centre}"


class _Heaviside(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, v: Tensor, side: float) -> Tensor:
        ctx.save_for_backward(x, v)
        ctx.side = side
        return sign(x + v - 0.5)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, v = ctx.saved_tensors
        shifted = x + ctx.side * v
        inside = grad * ((shifted >= 0) & (shifted <= 1))
        return inside, inside.sum(), None


@final
class AbcActivation(ActivationQuantizer):
    """``sum_n beta_n A_n`` with ``A_n = H_{v_n}(R)``: +1 where ``R + v_n >= 0.5``, else -1; v and beta are learned.

    Backward: ``sum_n beta_n G [0 <= R + v_n <= 1]`` to R, the sum over all elements of each of these terms to v_n, and
    the sum of ``G A_n`` to beta_n. The paper prints the mask as ``[0 <= R - v_n <= 1]``, which is not centred on the
    threshold and not the derivative of its own ``clip(R + v, 0, 1)``: that is ``mask="printed"``, for R and v alike.

    N is ``activation_bases``. v starts as in Table S4 if that has a row (N = 1, 3, 5; for N = 3 that of M = 3), else
    evenly spaced from -1.5 to 1.5; beta starts at 1. All channels share them; they decay only where norms do.
    Raises BonnQatError for ``activation_bases`` below 1 and another ``mask``.
    """

    is_pure = True

    def __init__(
        self, channels: int = 1, *, activation_bases: int = 1, mask: Literal["threshold", "printed"] = "threshold"
    ) -> None:
        super().__init__(channels)
        _check_bases("activation_bases", activation_bases)
        if mask not in ("threshold", "printed"):
            raise BonnQatError(f"the option mask of the scheme 'abcnet' must be 'threshold' or 'printed'; got {mask!r}")
        self.bits, self.mask = activation_bases, mask
        self.v = nn.Parameter(torch.tensor(_SHIFTS.get(self.bits) or _evenly(self.bits, 1.5)))
        self.beta = nn.Parameter(torch.ones(activation_bases))

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """R -> (sum_n beta_n A_n, its largest possible magnitude)."""
        side = 1.0 if self.mask == "threshold" else -1.0
        value = x.new_zeros(())
        for v, beta in zip(self.v.unbind(), self.beta.unbind(), strict=True):
            value = value + beta * cast(Tensor, _Heaviside.apply(x, v, side))
        return value, self.beta.detach().abs().sum()

    def extra_repr(self) -> str:
        """The options, for ``print(model)``."""
        return f"activation_bases={self.bits}, mask={self.mask!r}"


_REFERENCE = "Lin et al., Towards Accurate Binary Convolutional Neural Network, NIPS 2017, arXiv:1711.11294"
ABCNET = Scheme(name="abcnet", title="ABC-Net", reference=_REFERENCE, weight=AbcWeight, activation=AbcActivation)
ABCNET_5_5 = Scheme(
    name="abcnet-5-5",
    title="ABC-Net 5/5",
    reference=_REFERENCE,
    weight=functools.partial(AbcWeight, weight_bases=5),
    activation=functools.partial(AbcActivation, activation_bases=5),
)


@hookimpl
def bonn_qat_schemes() -> Iterable[Scheme]:
    """Offer ``abcnet``, of one basis each, and ``abcnet-5-5``, of five."""
    yield from (ABCNET, ABCNET_5_5)
