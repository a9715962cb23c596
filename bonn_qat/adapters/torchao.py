"""A config for torchao: ``quantize_(model, BonnConfig(step="prepare"), filter_fn)``, train, then the step "convert".

>>> quantize_(model, BonnConfig("bonn", step="prepare"), whole_model)
>>> train(model)
>>> quantize_(model, BonnConfig("bonn", step="convert"), whole_model)

``whole_model`` hands the model over as a whole: what comes out is what :func:`bonn_qat.binarize` gives, in place. Any
other ``filter_fn``, or a ``FqnToConfig``, picks single convolutions, linear layers and ReLUs. torchao shows a handler
one module without its name and its parent, so layer by layer a norm that starts at zero stays at zero, a layer that
stands at two places becomes two, the model loads no float state dict any more and has no ``binarization`` for
:class:`bonn_qat.Objective` to read the regularizers from: name them. torchao's own default filter takes the linear
layers and nothing else.
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
    """What ``quantize_`` does: ``"prepare"`` makes layers binary, ``"convert"`` keeps of them what inference needs.

    ``skip`` and ``include`` are those of :func:`bonn_qat.binarize`, for :func:`whole_model`. Converting changes no
    output and cannot be undone. Raises UnknownName for another step or scheme; ``quantize_`` raises InvalidModel for
    what cannot become binary and for what has nothing to convert.
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
    """The ``filter_fn`` that leaves the choice of layers to the policy of :func:`bonn_qat.binarize`."""
    return name == ""


@register_quantize_module_handler(BonnConfig)  # type: ignore[untyped-decorator]
def _apply(module: nn.Module, config: BonnConfig) -> nn.Module:
    return _prepare(module, config) if config.step == "prepare" else _convert(module)


def _prepare(module: nn.Module, config: BonnConfig) -> nn.Module:
    scheme = find_scheme(config.scheme)
    if isinstance(module, BinaryLayer):
        raise InvalidModel(f"{type(module).__name__} is already binary; prepare a model once")
    if isinstance(module, nn.ReLU | nn.ReLU6) and scheme.nonlinearity is not None:
        return scheme.nonlinearity(1)
    if not isinstance(module, nn.Conv2d | nn.Linear) and next(module.children(), None) is not None:
        return binarize(module, scheme, skip=config.skip, include=config.include, inplace=True)
    layer = binary_form(module, scheme)
    layer.to(layer.weight.device, layer.weight.dtype)
    layer.adopt(scheme.latent_std)
    return layer


def _convert(module: nn.Module) -> nn.Module:
    layers: list[Any] = [layer for layer in module.modules() if isinstance(layer, BinaryLayer)]
    if not layers:
        raise InvalidModel(
            f"nothing to convert in {type(module).__name__}, it has no binary layer; the step 'prepare' comes first, "
            "and filter_fn picks the same modules in both"
        )
    for layer in layers:
        layer.freeze()
    return module
