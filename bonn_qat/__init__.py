"""1-bit networks for PyTorch: BONN and its baselines as quantization-aware training."""

from bonn_qat.binarize import Binarization, binarize
from bonn_qat.errors import BonnQatError
from bonn_qat.hookspecs import hookimpl, hookspec
from bonn_qat.regularizers import CenterLoss, FeatureLoss, KernelLoss, Regularizer, Step
from bonn_qat.scheme import Scheme, Stage

__all__ = [
    "Binarization",
    "BonnQatError",
    "CenterLoss",
    "FeatureLoss",
    "KernelLoss",
    "Regularizer",
    "Scheme",
    "Stage",
    "Step",
    "binarize",
    "hookimpl",
    "hookspec",
]
