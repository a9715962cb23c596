"""MCN (Wang et al., Modulated Convolutional Networks, CVPR 2018): binary kernels times a learned M-Filter.

Equation numbers are those of the authors' book (Zhang et al., Binary Neural Networks, chapter 3). C latent kernels
``(O, I, kh, kw)`` or ``(O, I)``; C^ their binarization; M the layer's M-Filter ``(K, 1, kh, kw)`` or ``(K, 1)``; Q the
kernels that convolve, G their gradient. Weights only: activations, norms and nonlinearities stay the float network's.

The paper's feature maps have K channels each, and a kernel makes K of them, one with each plane of M (3.16). So that
a network keeps its shapes, here kernel o has the one plane ``j = o mod K``: a layer's O outputs are O / K such maps.
"""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor, nn

from bonn_qat import BonnQatError, Regularizer, Scheme, Stage, Step, hookimpl
from bonn_qat.functional import ste_sign
from bonn_qat.quantizers import ParameterRule, WeightQuantizer

_LLOYD_STEPS = 5  # latents that are symmetric about 0 start at the solution


@final
class McnWeight(WeightQuantizer):
    """``Q_o = C^_o * M_{o mod K}`` (3.12 to 3.14); M is ``m_filter``, starts at 1 and learns slowly; K is ``planes``.

    ``C^`` has two values for the layer, the nearer of two centres (of two at the same distance the upper one). With
    ``centres="kmeans"`` they are those of Lloyd's algorithm in one dimension, started at ``-mean|C|`` and ``mean|C|``,
    and a centre that no weight is near stays; with ``"sign"`` both stay. The paper gives no number of
    steps: here there are five, which reach the solution from latents that are symmetric about 0, and may stop short of
    it from others. ``modulation="mean"`` replaces each plane by its mean (MCN-1).

    Backward: ``G_o * M_j [|C_o| <= 1]`` to C (3.22), straight-through within the clip, C^'s centres constants; to M_j
    the sum of ``G_o * C^_o`` over the input channels and over all o with ``o mod K = j`` (3.26), or with
    ``"mean"`` its mean over the plane in each element. After each step M is its absolute value (3.25).

    Two parts of the paper are left out: the absolute value of the step of C (3.21), after which no kernel would have a
    negative weight, and the look-ahead term ``theta/2 ||C[k] - C - eta delta_C||^2`` of (3.19).

    A deployed layer keeps the centres (one number for ``"sign"``) and M. Raises BonnQatError for ``planes`` below 1 and
    another ``centres`` or ``modulation``.
    """

    scaled_sign = False
    parameter_rules: ClassVar[Mapping[str, ParameterRule]] = {"m_filter": ParameterRule(slow=True)}

    def __init__(
        self,
        weight: Tensor,
        *,
        planes: int = 4,
        centres: Literal["kmeans", "sign"] = "kmeans",
        modulation: Literal["elementwise", "mean"] = "elementwise",
    ) -> None:
        super().__init__()
        if not isinstance(planes, int) or planes < 1:
            raise BonnQatError(
                f"the option planes of the scheme 'mcn' must be a whole number, at least 1; got {planes!r}"
            )
        if centres not in ("kmeans", "sign"):
            raise BonnQatError(f"the option centres of the scheme 'mcn' must be 'kmeans' or 'sign'; got {centres!r}")
        if modulation not in ("elementwise", "mean"):
            raise BonnQatError(
                f"the option modulation of the scheme 'mcn' must be 'elementwise' or 'mean'; got {modulation!r}"
            )
        self.planes, self.centres, self.averaged = planes, centres, modulation == "mean"
        self.m_filter = nn.Parameter(weight.new_ones(planes, 1, *weight.shape[2:]))

    @torch.no_grad()
    def adopt(self, weight: Tensor) -> None:
        """Start from M = 1, whatever the float weights are."""
        self.m_filter.fill_(1)

    @torch.no_grad()
    def constrain(self, weight: Tensor) -> None:
        """Replace M by its absolute value (3.25)."""
        self.m_filter.abs_()

    @torch.no_grad()
    def binarize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """C -> (C^ of the same shape, half the distance of its two values)."""
        high = x.abs().mean()
        low = -high
        for _ in range(_LLOYD_STEPS if self.centres == "kmeans" else 0):
            upper = x >= (low + high) / 2
            above = upper.sum()
            below = x.numel() - above
            low = torch.where(below > 0, torch.where(upper, 0, x).sum() / below.clamp(min=1), low)
            high = torch.where(above > 0, torch.where(upper, x, 0).sum() / above.clamp(min=1), high)
        return torch.where(x >= (low + high) / 2, high, low), (high - low) / 2

    def modulate(self, kernels: Tensor) -> Tensor:
        """Kernel o times plane ``o mod K`` of M, or times its mean; shape of ``kernels``."""
        m: Tensor = self.m_filter
        if self.averaged:
            m = m.flatten(1).mean(1).reshape(-1, *[1] * (m.ndim - 1))
        rounds = -(-kernels.shape[0] // self.planes)
        return kernels * m.repeat(rounds, *[1] * (m.ndim - 1))[: kernels.shape[0]]

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """C -> (Q, half the distance of C^'s values)."""
        binary, scale = self.binarize(x.detach())
        clipped = ste_sign(x)  # for its gradient, which unlike clamp's is not 0 where |C| = 1
        # The difference is exactly 0, so that C^ keeps its two values.
        return self.modulate(binary + (clipped - clipped.detach())), scale

    def constants(self, weight: Tensor) -> int:
        """The centres, and M or the mean of each of its planes."""
        return (2 if self.centres == "kmeans" else 1) + (self.planes if self.averaged else self.m_filter.numel())

    def extra_repr(self) -> str:
        """The options, for ``print(model)``."""
        modulation = "mean" if self.averaged else "elementwise"
        return f"planes={self.planes}, centres={self.centres!r}, modulation={modulation!r}"


@final
class McnLoss(Regularizer):
    """MCN's filter loss, ``theta/2 sum_o ||C_o - C^_o * M_{o mod K}||^2`` over all layers, the first sum of (3.18).

    ``weight`` is theta, C^ a constant. Gradients: ``theta (C_o - Q_o)`` to C_o (3.23), and to M_j
    ``-theta sum_o (C_o - Q_o) * C^_o`` over the input channels and all o with ``o mod K = j`` (3.27).

    Call it as ``mcn()``. Raises BonnQatError for a model without weights of the scheme ``mcn``.
    """

    name = "mcn"

    def __init__(self, model: nn.Module, *, weight: float = 1e-3) -> None:
        super().__init__(model, weight=weight)
        layers = [layer for layer in model.modules() if isinstance(getattr(layer, "weight_quant", None), McnWeight)]
        if not layers:
            raise BonnQatError(f"no weights of the scheme 'mcn' in {type(model).__name__}; the loss 'mcn' needs them")
        # A tuple, because modules would be registered as submodules.
        self._layers: tuple[Any, ...] = tuple(layers)

    def loss(self, step: Step) -> Tensor:
        """The term without theta; a scalar."""
        terms = []
        for layer in self._layers:
            quantizer, latent = layer.weight_quant, layer.weight
            binary, _ = quantizer.binarize(latent.detach())
            terms.append(0.5 * (latent - quantizer.modulate(binary)).square().sum())
        return torch.stack(terms).sum()


MCN = Scheme(
    name="mcn",
    title="MCN",
    reference="Wang et al., Modulated Convolutional Networks, CVPR 2018",
    weight=McnWeight,
    activation=None,
    norm=None,
    nonlinearity=None,
    shortcut="block",
    stages=(  # the center loss in a fine-tuning stage is the paper's; shares and weights are ours
        Stage(share=0.8, regularizers={"mcn": 1e-4}),
        Stage(share=0.2, regularizers={"mcn": 1e-4, "center": 1e-3}),
    ),
)


@hookimpl
def bonn_qat_schemes() -> Iterable[Scheme]:
    """Offer ``mcn``."""
    yield MCN


@hookimpl
def bonn_qat_regularizers() -> Iterable[type[Regularizer]]:
    """Offer ``mcn``."""
    yield McnLoss
