"""Binary layers for loops that train with ``torch.ao.quantization``, which torch has deprecated.

>>> assign_qconfig(model, "bonn")
>>> model = prepare_qat(model.train())

A ``QConfig`` quantizes what comes out of a layer, and its factories do not know the layer; a binary layer needs its
input binarized, and parameters in the shape of its weight. So the ``QConfig`` here only names the scheme, and the layer
comes by torch.ao's own means for that, the ``mapping`` of ``prepare_qat`` to classes with a ``from_float``.

This is for the training alone: ``torch.ao.quantization.convert`` knows no binary kernel and leaves the layers as they
are. ``layer.freeze()`` keeps of one what inference needs. torch.ao turns a layer that stands at two places into two.
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
        "bonn_qat.adapters.torchao"
    ) from error

__all__ = ["assign_qconfig", "bonn_qconfig", "prepare_qat"]

_REPLACED = (nn.Conv2d, nn.Linear, nn.ReLU, nn.ReLU6)


@dataclass(frozen=True)
class _SchemeOf:
    """Stands where a ``QConfig`` has the factory of a weight's fake quantizer."""

    scheme: Scheme

    def __call__(self, **_: Any) -> NoReturn:
        raise InvalidModel(
            f"the QConfig of the scheme {self.scheme.name!r} is for bonn_qat.adapters.torch_ao.prepare_qat; that of "
            "torch.ao alone cannot binarize the inputs of a layer"
        )


def bonn_qconfig(scheme: str | Scheme = "bonn") -> Any:
    """A ``QConfig`` that makes a convolution or a linear layer binary, and of a ReLU the scheme's nonlinearity.

    Raises UnknownName.
    """
    return ao.QConfig(activation=nn.Identity, weight=_SchemeOf(find_scheme(scheme)))  # type: ignore[no-untyped-call]


def assign_qconfig(model: nn.Module, scheme: str | Scheme = "bonn", **options: Any) -> None:
    """Give a ``qconfig`` to the layers that :func:`bonn_qat.binarize` would replace, in place; ``options`` are its own.

    What has a ``qconfig`` already keeps it, None for float included. Norms that start at zero start at one, as there.
    Raises what :func:`bonn_qat.binarize` raises.
    """
    twin = binarize(model, scheme, **options)
    record: Any = twin.binarization
    replaced = dict(twin.named_modules())
    for name, module in model.named_modules():
        is_float = type(replaced.get(name)) is type(module)
        if isinstance(module, _REPLACED) and not is_float and not hasattr(module, "qconfig"):
            module.qconfig = bonn_qconfig(record.schemes.get(name, record.scheme))
    parameters = dict(model.named_parameters())
    for name in record.revived:
        nn.init.ones_(parameters[name if name in parameters else f"{name}.weight"])


def prepare_qat(model: nn.Module, mapping: dict[Any, Any] | None = None, inplace: bool = False) -> nn.Module:
    """``torch.ao.quantization.prepare_qat``, which also knows :func:`bonn_qconfig`; other layers are torch.ao's.

    Warns of the deprecation once. Raises InvalidModel for a layer that cannot become binary.
    """
    _warn_once()
    mapping = dict(ao.get_default_qat_module_mappings() if mapping is None else mapping)
    ours = {type(module) for module in model.modules() if _scheme(module) is not None}
    for kind in ours:
        mapping[kind] = _from_float_of(mapping.get(kind))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.ao.quantization is deprecated", DeprecationWarning)
        if ours:  # torch.ao looks for a qconfig after it has taken the layers that had one
            warnings.filterwarnings("ignore", "None of the submodule got qconfig", UserWarning)
        prepare: Any = ao.prepare_qat
        prepared: nn.Module = prepare(model, mapping=mapping, inplace=inplace)
    return prepared


def _scheme(module: nn.Module) -> Scheme | None:
    factory = getattr(getattr(module, "qconfig", None), "weight", None)
    return factory.scheme if isinstance(factory, _SchemeOf) else None


def _from_float_of(stock: Any) -> type:
    """What a mapping names: it makes a module binary, or hands one with another ``QConfig`` to ``stock``."""

    class Binary:
        @staticmethod
        def from_float(module: nn.Module, use_precomputed_fake_quant: bool = False) -> nn.Module:
            scheme = _scheme(module)
            if scheme is not None:
                return _replacement(module, scheme)
            return module if stock is None else stock.from_float(module)

    return Binary


def _replacement(module: nn.Module, scheme: Scheme) -> nn.Module:
    if isinstance(module, nn.ReLU | nn.ReLU6):
        new = module if scheme.nonlinearity is None else scheme.nonlinearity(1)
    else:
        layer = binary_form(module, scheme)
        layer.to(layer.weight.device, layer.weight.dtype)
        layer.adopt(scheme.latent_std)
        new = layer
    # None, for torch.ao passes a qconfig on to all below; the hooks it carries over itself.
    new.qconfig = None  # type: ignore[assignment]
    new._forward_hooks.clear()
    new._forward_pre_hooks.clear()
    return new


@functools.cache
def _warn_once() -> None:
    warnings.warn(
        "torch.ao.quantization is deprecated and will go from torch. It still trains binary layers; new code takes "
        "bonn_qat.binarize, or torchao's quantize_ with bonn_qat.adapters.torchao",
        DeprecationWarning,
        stacklevel=3,
    )
