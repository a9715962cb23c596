"""1-bit networks for PyTorch: BONN and its baselines as quantization-aware training."""

from bonn_qat.binarization.binarize import Binarization, binarize
from bonn_qat.bop import Bop, binary_parameters
from bonn_qat.errors import BonnQatError
from bonn_qat.exporting.export import export
from bonn_qat.hookspecs import hookimpl
from bonn_qat.inspection.diagnose import diagnose
from bonn_qat.inspection.flips import FlipRatio
from bonn_qat.inspection.summary import summary
from bonn_qat.objective import Objective, advance, constrain_, parameter_groups
from bonn_qat.packing.pack import pack
from bonn_qat.regularizers import CenterLoss, FeatureLoss, KernelLoss, Regularizer, Step
from bonn_qat.runtime.packed import PackedModel
from bonn_qat.scheme import Scheme, Stage
from bonn_qat.training.recipe import Recipe
from bonn_qat.training.train import train

__all__ = [
    "Binarization",
    "BonnQatError",
    "Bop",
    "CenterLoss",
    "FeatureLoss",
    "FlipRatio",
    "KernelLoss",
    "Objective",
    "PackedModel",
    "Recipe",
    "Regularizer",
    "Scheme",
    "Stage",
    "Step",
    "advance",
    "binarize",
    "binary_parameters",
    "constrain_",
    "diagnose",
    "export",
    "hookimpl",
    "pack",
    "parameter_groups",
    "summary",
    "train",
]
