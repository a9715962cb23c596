"""Scheme: what "1-bit" means for a network, as frozen data."""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from torch import Tensor, nn

from bonn_qat import functional
from bonn_qat.errors import InvalidRecipe, UnknownName
from bonn_qat.quantizers import ActivationQuantizer, WeightQuantizer


class PReLU(nn.PReLU):
    """``nn.PReLU`` with the backward of :func:`bonn_qat.functional.prelu`."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.prelu(input, self.weight)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of a training run: its share of the epochs, and the weights of the regularizers in it."""

    share: float = 1.0
    regularizers: Mapping[str, float] = field(default_factory=dict)
    lr_scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise InvalidRecipe(f"a stage's share is a part of the epochs, above 0 and at most 1; got {self.share}")
        if not self.lr_scale > 0:
            raise InvalidRecipe(f"a stage's lr_scale is above 0; got {self.lr_scale}")


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How weights and activations become binary, and what stands between the binary layers.

    ``weight`` makes a quantizer for a float weight, ``activation`` one for a layer's input; ``None`` leaves
    them float, and a scheme without ``weight`` leaves the whole network as it is.

    ``norm`` (given the channels) stands before each sign, ``nonlinearity`` (given the channels, or 1 where
    they are unknown) replaces each ReLU: after a ReLU every sign would be +1. ``shortcut`` and
    ``nonlinearity_position`` shape the blocks that can be rebuilt (those with a ``binary_form``): one
    shortcut per convolution or the float block's own; the nonlinearity after or before the addition.

    ``latent_std`` rescales the latent weights of every binary layer to this standard deviation, which
    keeps their signs; ``None`` leaves them.
    """

    name: str
    title: str
    reference: str
    weight: Callable[..., WeightQuantizer] | None
    activation: Callable[[], ActivationQuantizer] | None
    norm: Callable[[int], nn.Module] | None = nn.BatchNorm2d
    nonlinearity: Callable[[int], nn.Module] | None = PReLU
    shortcut: Literal["conv", "block"] = "conv"
    nonlinearity_position: Literal["after_add", "before_add"] = "after_add"
    latent_std: float | None = None
    stages: tuple[Stage, ...] = (Stage(),)

    @property
    def regularizers(self) -> dict[str, float]:
        """The weights of the regularizers when all of them are on: those of the last stage."""
        return dict(self.stages[-1].regularizers)

    def configure(self, options: Mapping[str, Any]) -> "Scheme":
        """A copy with other options: this class's own, or keyword arguments of the weight quantizer.

        Raises UnknownName for an option that neither has.
        """
        own = {f.name for f in fields(self)} - {"name", "title", "reference", "weight", "activation", "stages"}
        quantizer = _keywords(self.weight)
        for option in options:
            if option not in own | quantizer:
                raise UnknownName(f"option of the scheme {self.name!r}", option, own | quantizer)
        changed: dict[str, Any] = {key: value for key, value in options.items() if key in own}
        passed = {key: value for key, value in options.items() if key in quantizer}
        if passed and self.weight is not None:
            changed["weight"] = functools.partial(self.weight, **passed)
        return replace(self, **changed)


def _keywords(function: Callable[..., Any] | None) -> set[str]:
    if function is None:
        return set()
    parameters = inspect.signature(function).parameters.values()
    return {p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
