"""Binary layers for training loops that use ``torch.ao.quantization``, which torch has deprecated.

>>> assign_qconfig(model, "bonn")
>>> model = prepare_qat(model.train())

A ``QConfig`` quantizes a layer's output, and its factories do not know the layer. A binary layer needs its input
binarized, and parameters in the shape of its weight. So the ``QConfig`` here only names the scheme; the layer is
replaced through the ``mapping`` of ``prepare_qat``, from classes to classes with a ``from_float``.

This is for training only: ``torch.ao.quantization.convert`` has no binary kernel and leaves binary layers unchanged.
``layer.freeze()`` reduces a layer to what inference needs. torch.ao turns a layer used in two places into two layers.
"""

import functools
import warnings
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import nn

from bonn_qat.binarization.binarize import binarize
from bonn_qat.errors import InvalidModel
from bonn_qat.layers import binary_form
from bonn_qat.plugins import find_scheme
from bonn_qat.scheme import Scheme

try:
    import torch.ao.quantization as ao
except ImportError as error:
    raise ImportError(
        f"torch {torch.__version__} has no torch.ao.quantization; use bonn_qat.binarize, or torchao's quantize_ with "
        "bonn_qat.adapters.torchao.BonnConfig"
    ) from error

__all__ = ["assign_qconfig", "bonn_qconfig", "prepare_qat"]

_REPLACED = (nn.Conv2d, nn.Linear, nn.ReLU, nn.ReLU6)


@dataclass(frozen=True)
class _SchemeOf:
    """Takes the place of the weight's fake quantizer factory in a ``QConfig``, and names the scheme.

    ``channels`` are those of what a ReLU reads, 1 if unknown; ``any_layout`` is that of a binary layer.
    """

    scheme: Scheme
    channels: int = 1
    any_layout: bool = False

    def __call__(self, **_: Any) -> NoReturn:
        raise InvalidModel(
            f"the QConfig of the scheme {self.scheme.name!r} needs bonn_qat.adapters.torch_ao.prepare_qat; the "
            "prepare_qat of torch.ao cannot binarize a layer's input"
        )


def bonn_qconfig(scheme: str | Scheme = "bonn") -> Any:
    """A ``QConfig`` that makes a convolution or linear layer binary and turns a ReLU into the scheme's nonlinearity.

    Raises UnknownName for an unknown scheme.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3))
    >>> model[0].qconfig = bonn_qconfig("bonn")
    """
    return _qconfig(_SchemeOf(find_scheme(scheme)))


def _qconfig(of: _SchemeOf) -> Any:
    return ao.QConfig(activation=nn.Identity, weight=of)  # type: ignore[no-untyped-call]


def assign_qconfig(model: nn.Module, scheme: str | Scheme = "bonn", **options: Any) -> None:
    """Set ``qconfig`` on the layers that :func:`bonn_qat.binarize` would replace, in place; ``options`` are passed on.

    A module that already has a ``qconfig`` keeps it, also if it is None (float). As in ``binarize``, norms whose
    weights start at zero start at one. Raises what :func:`bonn_qat.binarize` raises.
    """
    twin = binarize(model, scheme, **options)
    record: Any = twin.binarization
    replaced = dict(twin.named_modules())
    for name, module in model.named_modules():
        new = replaced.get(name)
        if isinstance(module, _REPLACED) and type(new) is not type(module) and not hasattr(module, "qconfig"):
            scheme_of, any_layout = record.schemes.get(name, record.scheme), getattr(new, "any_layout", False)
            module.qconfig = _qconfig(_SchemeOf(scheme_of, record.channels.get(name, 1), any_layout))
    parameters = dict(model.named_parameters())
    for name in record.revived:
        nn.init.ones_(parameters[name if name in parameters else f"{name}.weight"])


def prepare_qat(model: nn.Module, mapping: dict[Any, Any] | None = None, inplace: bool = False) -> nn.Module:
    """``torch.ao.quantization.prepare_qat`` that also understands :func:`bonn_qconfig`; torch.ao handles other layers.

    Warns once that torch.ao is deprecated. Raises InvalidModel for a layer that cannot become binary.
    """
    _warn_once()
    mapping = dict(ao.get_default_qat_module_mappings() if mapping is None else mapping)
    ours = {type(module) for module in model.modules() if _given(module) is not None}
    for kind in ours:
        mapping[kind] = _from_float_of(mapping.get(kind))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.ao.quantization is deprecated", DeprecationWarning)
        if ours:  # torch.ao looks for a qconfig after it replaced the layers that had one
            warnings.filterwarnings("ignore", "None of the submodule got qconfig", UserWarning)
        prepare: Any = ao.prepare_qat
        prepared: nn.Module = prepare(model, mapping=mapping, inplace=inplace)
    return prepared


def _given(module: nn.Module) -> _SchemeOf | None:
    factory = getattr(getattr(module, "qconfig", None), "weight", None)
    return factory if isinstance(factory, _SchemeOf) else None


def _from_float_of(stock: Any) -> type:
    """A class for ``mapping``: makes a module binary, or passes one with another ``QConfig`` to ``stock``."""

    class Binary:
        @staticmethod
        def from_float(module: nn.Module, use_precomputed_fake_quant: bool = False) -> nn.Module:
            given = _given(module)
            if given is not None:
                return _replacement(module, given)
            return module if stock is None else stock.from_float(module)

    return Binary


def _replacement(module: nn.Module, given: _SchemeOf) -> nn.Module:
    if isinstance(module, nn.ReLU | nn.ReLU6):
        new = module if given.scheme.nonlinearity is None else given.scheme.nonlinearity(given.channels)
    else:
        layer = binary_form(module, given.scheme)
        layer.to(layer.weight.device, layer.weight.dtype)
        layer.adopt()
        layer.any_layout = given.any_layout
        new = layer
    # torch.ao passes a qconfig on to child modules, so it is None here; torch.ao copies the hooks itself.
    new.qconfig = None  # type: ignore[assignment]
    new._forward_hooks.clear()
    new._forward_pre_hooks.clear()
    return new


@functools.cache
def _warn_once() -> None:
    warnings.warn(
        "torch.ao.quantization is deprecated and will be removed from torch. It still trains binary layers; in new "
        "code use bonn_qat.binarize, or torchao's quantize_ with bonn_qat.adapters.torchao",
        DeprecationWarning,
        stacklevel=3,
    )
