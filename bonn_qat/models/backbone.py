"""The base class of this package's networks, with timm's interface, and their common entry point."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

from timm.layers import create_classifier
from timm.models import build_model_with_cfg
from torch import Tensor, nn

from bonn_qat import plugins
from bonn_qat.errors import InvalidRecipe
from bonn_qat.scheme import Scheme

_OF_TIMM = {"pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}


class Backbone(nn.Module, ABC):
    """timm's interface around ``forward_features``: classifier, pooled head, checkpointing.

    A subclass ends its ``__init__`` with :meth:`make_head`.
    """

    num_features: int
    head_hidden_size: int
    num_classes: int

    def __init__(self) -> None:
        super().__init__()
        self.grad_checkpointing = False

    @abstractmethod
    def forward_features(self, x: Tensor) -> Tensor:
        """Images ``(B, in_chans, H, W) -> (B, num_features, h, w)``."""

    def make_head(self, num_features: int, num_classes: int, global_pool: str) -> None:
        """Pooling and a linear classifier behind ``num_features`` channels."""
        self.num_features = self.head_hidden_size = num_features
        self.reset_classifier(num_classes, global_pool)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations of each block in the backward pass instead of keeping them."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The layer that turns features into logits."""
        return self.fc  # type: ignore[no-any-return]

    def reset_classifier(self, num_classes: int, global_pool: str = "avg") -> None:
        """A new classifier of ``num_classes``; 0 leaves the features ``(B, num_features)`` as they are."""
        self.num_classes = num_classes
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=global_pool)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """``(B, num_features, h, w) -> (B, num_classes)``, or with ``pre_logits`` ``(B, num_features)``."""
        x = self.global_pool(x)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images -> logits ``(B, num_classes)``."""
        return self.forward_head(self.forward_features(x))


def build(
    model: Callable[..., nn.Module],
    variant: str,
    pretrained: bool,
    architecture: Mapping[str, Any],
    *,
    scheme: str | Scheme | None = None,
    **kwargs: Any,
) -> nn.Module:
    """The timm model ``variant``, float, or binarized by ``scheme``; with the tag of a plugin's network, that network.

    ``architecture`` are the arguments of ``model`` that make it ``variant``, ``kwargs`` those of the caller. Raises
    what :func:`bonn_qat.binarize` raises.
    """
    tag = kwargs.get("pretrained_cfg")
    if isinstance(tag, str) and (name := f"{variant}.{tag}") in plugins.pretrained():
        if scheme is not None:
            raise InvalidRecipe(f"{name} has its scheme already; leave out scheme={scheme!r}")
        from bonn_qat.training.pretrained import create_model  # which ranks above the models

        return create_model(name, pretrained, **{key: kwargs[key] for key in kwargs.keys() - _OF_TIMM})
    built: nn.Module = build_model_with_cfg(model, variant, pretrained, **{**architecture, **kwargs})
    if scheme is None:
        return built
    from bonn_qat.binarization.binarize import binarize

    return binarize(built, scheme, inplace=True)
