"""BONN as a plugin: the file to copy for a scheme of one's own."""

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
    latent_std=0.01,  # the scale of Fig. 3; with larger latents the kernel loss is lost beside weight decay
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
