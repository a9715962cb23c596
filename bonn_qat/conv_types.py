"""Conv types: which convolutions and linear layers can become binary, and what their classes do beyond torch's own."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import nn
from torch.nn.utils.parametrize import is_parametrized


class ConvType(NamedTuple):
    """``same_padding``: pads as TensorFlow's SAME does; ``standardizes``: the kernels have mean 0 and variance 1."""

    same_padding: bool = False
    standardizes: bool = False


# timm's classes by the class that owns the forward; whether those with a `same_pad` pad is the instance's affair.
_TIMM: Mapping[str, ConvType] = {
    "Linear": ConvType(),
    "Conv2dSame": ConvType(same_padding=True),
    "Conv2dSameExport": ConvType(same_padding=True),
    "StdConv2d": ConvType(standardizes=True),
    "StdConv2dSame": ConvType(standardizes=True),
    "ScaledStdConv2d": ConvType(standardizes=True),
    "ScaledStdConv2dSame": ConvType(standardizes=True),
}


def conv_type(layer: nn.Module) -> ConvType:
    """What ``layer`` does beyond its class of torch.

    Raises ValueError with the reason for a layer that cannot become binary.
    """
    kind = type(layer).__name__
    if not isinstance(layer, nn.Conv2d | nn.Linear):
        raise ValueError(f"{kind} is neither a Conv2d nor a Linear")
    if is_parametrized(layer) or layer._parameters.get("weight") is None:
        raise ValueError(f"{kind} computes its weight, see torch.nn.utils.parametrize")
    owner = next(k for k in type(layer).__mro__ if {"forward", "_conv_forward"} & vars(k).keys())
    if owner in (nn.Conv2d, nn.Linear):
        return ConvType()
    if owner.__module__.startswith("timm.layers") and owner.__name__ in _TIMM:
        found = _TIMM[owner.__name__]
        return found._replace(same_padding=found.same_padding or bool(getattr(layer, "same_pad", False)))
    raise ValueError(f"{kind} has a forward of its own")
