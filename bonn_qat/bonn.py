"""BONN, the scheme of this package (Gu et al., ICCV 2019, arXiv:1908.06314), as a plugin like any other.

Kernels are ``mean(w) * sign(X)``: X are the latent weights, real numbers that the optimizer updates, and w is the
layer's modulation, a learned parameter whose mean is the scale of the signs. The estimators, which replace the
derivative of the sign, are the clipped identity for activations and the paper's (12) and (15) for weights. The terms
are those of :mod:`bonn_qat.scheme`; ``docs/plugins.md`` says how to write a scheme.
"""

from collections.abc import Iterable

from bonn_qat.hookspecs import hookimpl
from bonn_qat.quantizers import BonnWeight, sign_activation
from bonn_qat.regularizers import CenterLoss, FeatureLoss, KernelLoss, Regularizer
from bonn_qat.scheme import Scheme, Stage

BONN = Scheme(
    name="bonn",
    title="BONN",
    reference="Gu et al., Bayesian Optimized 1-Bit CNNs, ICCV 2019, arXiv:1908.06314",
    weight=BonnWeight,
    activation=sign_activation,
    latent_std=0.01,  # as in Fig. 3; with larger latents weight decay outweighs the kernel loss
    stages=(
        Stage(share=0.8, regularizers={"kernel": 1e-4}),
        Stage(share=0.2, regularizers={"kernel": 1e-4, "feature": 1e-3}),
    ),
)


@hookimpl
def bonn_qat_schemes() -> Iterable[Scheme]:
    """Offer ``bonn``."""
    yield BONN


@hookimpl
def bonn_qat_regularizers() -> Iterable[type[Regularizer]]:
    """Offer ``kernel``, ``feature`` and ``center``."""
    yield from (KernelLoss, FeatureLoss, CenterLoss)
