"""Conv types: which convolutions and linear layers can become binary, what their classes add to torch's, their MACs."""

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
MATRICES = (*CONVOLUTIONS, nn.Linear)


_OTHERS: Sequence[tuple[tuple[type[nn.Module], ...], str]] = (
    ((nn.Embedding, nn.EmbeddingBag), "looks up rows of its weight and multiplies nothing"),
    ((nn.MultiheadAttention, nn.RNNBase), "multiplies by its weights inside one function of torch"),
)


class ConvType(NamedTuple):
    """``same_padding``: pads like TensorFlow's SAME. ``standardizes``: uses kernels of mean 0 and variance 1."""

    same_padding: bool = False
    standardizes: bool = False


# timm's classes, by the class that defines the forward pass; whether to pad is an attribute of some, `same_pad`.
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
    """What ``layer`` adds to its class of torch.

    Raises ValueError, with the reason, for a layer that cannot become binary.

    >>> conv_type(nn.Conv2d(3, 8, 3))
    ConvType(same_padding=False, standardizes=False)
    """
    kind = type(layer).__name__
    if not isinstance(layer, MATRICES):
        why = next(
            (why for others, why in _OTHERS if isinstance(layer, others)), "is neither a convolution nor a Linear"
        )
        raise ValueError(f"{kind} {why}")
    if is_parametrized(layer) or layer._parameters.get("weight") is None:
        raise ValueError(f"{kind} computes its weight{_by(layer)}")
    owner = next(k for k in type(layer).__mro__ if {"forward", "_conv_forward"} & vars(k).keys())
    if owner in MATRICES:
        return ConvType()
    if owner.__module__.startswith("timm.layers") and owner.__name__ in _TIMM:
        found = _TIMM[owner.__name__]
        return found._replace(same_padding=found.same_padding or bool(getattr(layer, "same_pad", False)))
    raise ValueError(f"{kind} has a forward of its own")


def _by(layer: nn.Module) -> str:
    tools: list[object] = list(layer._forward_pre_hooks.values())  # weight_norm, spectral_norm, prune
    if is_parametrized(layer):
        tools = [tool for chain in layer.parametrizations.values() for tool in chain]  # type: ignore[operator]
    names = dict.fromkeys(type(tool).__name__.lstrip("_") for tool in tools if not inspect.isroutine(tool))
    return f" by {', '.join(names)}" if names else ""


def macs(layer: nn.Module, source: Sequence[int], result: Sequence[int]) -> int:
    """The MACs of a convolution or a linear layer for inputs and outputs of these shapes; 0 for other layers.

    >>> macs(nn.Conv2d(3, 8, 3), (1, 3, 32, 32), (1, 8, 30, 30))
    194400
    """
    if isinstance(layer, nn.Linear):
        return math.prod(result) * layer.in_features
    if isinstance(layer, TRANSPOSED):
        return math.prod(source) * layer.out_channels // layer.groups * math.prod(layer.kernel_size)
    if isinstance(layer, CONVOLUTIONS):
        return math.prod(result) * layer.in_channels // layer.groups * math.prod(layer.kernel_size)
    return 0
