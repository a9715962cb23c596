"""1-bit networks for PyTorch: BONN and its baselines as quantization-aware training.

Each name is imported when it is first used: ``import bonn_qat`` alone loads neither torch nor timm.
"""

import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

from bonn_qat.adapters.timm_models import register_models

if TYPE_CHECKING:
    from bonn_qat.binarization.binarize import Binarization, binarize, binary_layers
    from bonn_qat.bop import Bop, binary_parameters
    from bonn_qat.errors import BonnQatError
    from bonn_qat.exporting.export import export
    from bonn_qat.hookspecs import Pretrained, hookimpl
    from bonn_qat.inspection.diagnose import diagnose
    from bonn_qat.inspection.flips import FlipRatio
    from bonn_qat.inspection.summary import summary
    from bonn_qat.objective import Objective, advance, constrain_, parameter_groups
    from bonn_qat.packing.pack import pack
    from bonn_qat.regularizers import CenterLoss, FeatureLoss, KernelLoss, Regularizer, Step
    from bonn_qat.runtime.packed import PackedModel
    from bonn_qat.scheme import Scheme, Stage
    from bonn_qat.training.data import load as load_data
    from bonn_qat.training.evaluate import evaluate
    from bonn_qat.training.hub import from_pretrained, push_to_hub, save_pretrained
    from bonn_qat.training.network import load, save
    from bonn_qat.training.pretrained import create_model, list_models
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
    "Pretrained",
    "Recipe",
    "Regularizer",
    "Scheme",
    "Stage",
    "Step",
    "advance",
    "binarize",
    "binary_layers",
    "binary_parameters",
    "constrain_",
    "create_model",
    "diagnose",
    "evaluate",
    "export",
    "from_pretrained",
    "hookimpl",
    "list_models",
    "load",
    "load_data",
    "pack",
    "parameter_groups",
    "push_to_hub",
    "save",
    "save_pretrained",
    "summary",
    "train",
]

# The imports above once more, as data; a test compares the two.
_NAMES = {
    "binarization.binarize": ("Binarization", "binarize", "binary_layers"),
    "bop": ("Bop", "binary_parameters"),
    "errors": ("BonnQatError",),
    "exporting.export": ("export",),
    "hookspecs": ("Pretrained", "hookimpl"),
    "inspection.diagnose": ("diagnose",),
    "inspection.flips": ("FlipRatio",),
    "inspection.summary": ("summary",),
    "objective": ("Objective", "advance", "constrain_", "parameter_groups"),
    "packing.pack": ("pack",),
    "regularizers": ("CenterLoss", "FeatureLoss", "KernelLoss", "Regularizer", "Step"),
    "runtime.packed": ("PackedModel",),
    "scheme": ("Scheme", "Stage"),
    "training.data": ("load as load_data",),
    "training.evaluate": ("evaluate",),
    "training.hub": ("from_pretrained", "push_to_hub", "save_pretrained"),
    "training.network": ("load", "save"),
    "training.pretrained": ("create_model", "list_models"),
    "training.recipe": ("Recipe",),
    "training.train": ("train",),
}
_HOME = {text.split()[-1]: (module, text.split()[0]) for module, names in _NAMES.items() for text in names}

__version__: str


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


if not TYPE_CHECKING:  # mypy would take it that every name exists

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            return importlib.import_module("importlib.metadata").version("bonn-qat")
        if name in _HOME:
            module, attribute = _HOME[name]
            value = getattr(importlib.import_module(f"bonn_qat.{module}"), attribute)
        elif not name.startswith("_") and importlib.util.find_spec(f"bonn_qat.{name}"):
            value = importlib.import_module(f"bonn_qat.{name}")
        else:
            raise AttributeError(f"module 'bonn_qat' has no attribute {name!r}", name=name, obj=sys.modules[__name__])
        globals()[name] = value
        return value


register_models()
