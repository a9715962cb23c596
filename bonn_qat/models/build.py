"""What every entry point of this package does: build a timm model, and binarize it if a scheme is named."""

from collections.abc import Callable
from typing import Any

from timm.models import build_model_with_cfg
from torch import nn

from bonn_qat.scheme import Scheme


def build(
    model: Callable[..., nn.Module],
    variant: str,
    pretrained: bool,
    *,
    scheme: str | Scheme | None = None,
    **kwargs: Any,
) -> nn.Module:
    """The timm model ``variant``, float, or binarized by ``scheme``. Raises what :func:`bonn_qat.binarize` raises."""
    built: nn.Module = build_model_with_cfg(model, variant, pretrained, **kwargs)
    if scheme is None:
        return built
    # The verb stands above the models, which are one of the things that it is applied to.
    from bonn_qat.binarize import binarize

    return binarize(built, scheme, inplace=True)
