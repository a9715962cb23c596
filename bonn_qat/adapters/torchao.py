"""A config for torchao: ``quantize_(model, BonnConfig(step="prepare"), filter_fn)``, train, then the step "convert".

>>> quantize_(model, BonnConfig("bonn", step="prepare"), whole_model)
>>> train(model)
>>> quantize_(model, BonnConfig("bonn", step="convert"), whole_model)

``whole_model`` selects the model as a whole: the result is that of :func:`bonn_qat.binarize`, in place. Any other
``filter_fn``, or a ``FqnToConfig``, selects single convolutions, linear layers and ReLUs. torchao passes a handler one
module without its name or parent. So, layer by layer, a norm whose weights start at zero keeps them, a layer used in
two places becomes two, the model no longer loads a float state dict, and it has no ``binarization`` from which
:class:`bonn_qat.Objective` could read the regularizers: name them. torchao's default filter selects linear layers only.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn
from torchao.core.config import AOBaseConfig
from torchao.quantization.transform_module import register_quantize_module_handler

from bonn_qat.binarization.binarize import binarize
from bonn_qat.errors import InvalidModel, UnknownName
from bonn_qat.layers import BinaryLayer, binary_form
from bonn_qat.plugins import find_scheme
from bonn_qat.scheme import Scheme

__all__ = ["BonnConfig", "whole_model"]

_STEPS = ("prepare", "convert")


@dataclass(frozen=True)
class BonnConfig(AOBaseConfig):  # type: ignore[misc]
    """A config for ``quantize_``: ``"prepare"`` makes layers binary, ``"convert"`` reduces them to inference.

    ``skip`` and ``include`` are those of :func:`bonn_qat.binarize`, for :func:`whole_model`. Converting changes no
    output and cannot be undone. Raises UnknownName for an unknown step or scheme; ``quantize_`` raises InvalidModel for
    a module that cannot become binary, and for one without a binary layer to convert.

    >>> BonnConfig("bonn", step="prepare").step
    'prepare'
    """

    scheme: str | Scheme = "bonn"
    step: str = "prepare"
    skip: tuple[str, ...] = ()
    include: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.step not in _STEPS:
            raise UnknownName("step of BonnConfig", self.step, _STEPS)
        find_scheme(self.scheme)


def whole_model(module: nn.Module, name: str) -> bool:
    """A ``filter_fn`` that leaves the choice of layers to the policy of :func:`bonn_qat.binarize`.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3))
    >>> whole_model(model, ""), whole_model(model[0], "0")
    (True, False)
    """
    return name == ""


@register_quantize_module_handler(BonnConfig)  # type: ignore[untyped-decorator]
def _apply(module: nn.Module, config: BonnConfig) -> nn.Module:
    return _prepare(module, config) if config.step == "prepare" else _convert(module)


def _prepare(module: nn.Module, config: BonnConfig) -> nn.Module:
    scheme = find_scheme(config.scheme)
    if isinstance(module, BinaryLayer):
        raise InvalidModel(f"{type(module).__name__} is already binary; use the step 'prepare' only once")
    if isinstance(module, nn.ReLU | nn.ReLU6) and scheme.nonlinearity is not None:
        return scheme.nonlinearity(1)  # torchao tells a name, but not what the module reads
    if not isinstance(module, nn.Conv2d | nn.Linear) and next(module.children(), None) is not None:
        return binarize(module, scheme, skip=config.skip, include=config.include, inplace=True)
    layer = binary_form(module, scheme)
    layer.to(layer.weight.device, layer.weight.dtype)
    layer.adopt()
    return layer


def _convert(module: nn.Module) -> nn.Module:
    layers: list[Any] = [layer for layer in module.modules() if isinstance(layer, BinaryLayer)]
    if not layers:
        raise InvalidModel(
            f"nothing to convert in {type(module).__name__}: it has no binary layer; use the step 'prepare' first, "
            "with the same filter_fn"
        )
    for layer in layers:
        layer.freeze()
    return module
