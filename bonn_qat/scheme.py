"""Scheme: what "1-bit" means for a network, as frozen data."""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bonn_qat import functional
from bonn_qat.errors import InvalidRecipe, UnknownName
from bonn_qat.quantizers import ActivationQuantizer, WeightQuantizer, number


class PReLU(nn.PReLU):
    """``nn.PReLU`` with the backward of :func:`bonn_qat.functional.prelu`."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.prelu(input, self.weight)


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _identity(channels: int) -> nn.Module:
    return nn.Identity()


def _relu(channels: int) -> nn.Module:
    return nn.ReLU()


def _hardtanh(channels: int) -> nn.Module:
    return nn.Hardtanh()


WEIGHTS = ("binary", "float")
SHORTCUTS = ("conv", "block")
POSITIONS = ("after_add", "before_add")
NONLINEARITIES: Mapping[str, Callable[[int], nn.Module]] = {
    "prelu": PReLU,
    "relu": _relu,
    "hardtanh": _hardtanh,
    "identity": _identity,
}
TRAINS = ("all", "norms")
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor] | None] = {
    "binary": None,
    "float": _as_it_is,
    "relu": torch.relu,
    "leaky_clip": functional.leaky_clip,
    "clip": nn.functional.hardtanh,
}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of a training run.

    ``share`` of the epochs; ``regularizers`` and their weights; ``lr_scale`` multiplies the learning rate.
    ``weights`` ``"float"`` trains the latent weights as a float network's; at the first binary stage after that the
    quantizers start from them anew. ``activations`` names what stands in the place of the activation quantizer:
    ``"binary"`` itself, ``"relu"``, ``"leaky_clip"``, ``"clip"`` or ``"float"`` (nothing), the steps of Bi-Real
    Net's training. ``trains`` ``"norms"`` lets only the norms learn. ``recompute_norms`` ends the stage with a pass
    over the training set that measures the batch norms' statistics anew.
    """

    share: float = 1.0
    regularizers: Mapping[str, float] = field(default_factory=dict)
    lr_scale: float = 1.0
    weights: str = "binary"
    activations: str = "binary"
    trains: str = "all"
    recompute_norms: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise InvalidRecipe(f"a stage's share is a part of the epochs, above 0 and at most 1; got {self.share}")
        if not number(self.lr_scale) > 0:
            raise InvalidRecipe(f"a stage's lr_scale is a number above 0; got {self.lr_scale}")
        for name, weight in self.regularizers.items():
            if not number(weight) >= 0:
                raise InvalidRecipe(f"the weight of {name!r} in a stage is a number of at least 0; got {weight}")
        for name, allowed in (("weights", WEIGHTS), ("activations", ACTIVATIONS), ("trains", TRAINS)):
            if getattr(self, name) not in allowed:
                raise UnknownName(f"{name} of a stage", getattr(self, name), allowed)


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How weights and activations become binary, and what stands between the binary layers.

    ``weight`` makes a quantizer for a float weight, ``activation`` one for a layer's input (given its channels, or
    1 where they are unknown); ``None`` leaves them float, and a scheme without ``weight`` leaves the whole network
    as it is. ``output`` (given the channels) makes a module that stands behind each binary convolution.

    ``norm`` (given the channels) stands before each sign, ``nonlinearity`` (given the channels, or 1 where
    they are unknown) replaces each ReLU: after a ReLU every sign would be +1. ``shortcut`` and
    ``nonlinearity_position`` shape the blocks that can be rebuilt (those with a ``binary_form``): one
    shortcut per convolution or the float block's own; the nonlinearity after or before the addition.

    ``latent_std`` rescales the latent weights of every binary layer to this standard deviation, which
    keeps their signs; ``None`` leaves them.

    Raises UnknownName for another ``shortcut`` or ``nonlinearity_position``, InvalidRecipe for an impossible
    ``latent_std``.
    """

    name: str
    title: str
    reference: str
    weight: Callable[..., WeightQuantizer] | None
    activation: Callable[[int], ActivationQuantizer] | None
    output: Callable[[int], nn.Module] | None = None
    norm: Callable[[int], nn.Module] | None = nn.BatchNorm2d
    nonlinearity: Callable[[int], nn.Module] | None = PReLU
    shortcut: Literal["conv", "block"] = "conv"
    nonlinearity_position: Literal["after_add", "before_add"] = "after_add"
    latent_std: float | None = None
    stages: tuple[Stage, ...] = (Stage(),)

    def __post_init__(self) -> None:
        for name, allowed in (("shortcut", SHORTCUTS), ("nonlinearity_position", POSITIONS)):
            if getattr(self, name) not in allowed:
                raise UnknownName(f"{name} of the scheme {self.name!r}", str(getattr(self, name)), allowed)
        if self.latent_std is not None and not number(self.latent_std) > 0:
            raise InvalidRecipe(f"the latent_std of the scheme {self.name!r} is above 0; got {self.latent_std!r}")

    @property
    def regularizers(self) -> dict[str, float]:
        """The weights of the regularizers when all of them are on: those of the last stage."""
        return dict(self.stages[-1].regularizers)

    @property
    def options(self) -> dict[str, Any]:
        """Names and defaults of what a scheme can be told.

        They are the keyword-only arguments of its quantizers' factories, and the names of the regularizers of its
        stages, with the weight of the last stage that has each.
        """
        options = {name: weight for stage in self.stages for name, weight in stage.regularizers.items()}
        return {name: value for part in _PARTS for name, value in _keywords(getattr(self, part)).items()} | options

    @property
    def bits(self) -> str:
        """Bits of weights and activations, such as ``"1/1"``; 32 is float."""
        weight = 32 if self.weight is None else self.weight(torch.ones(2, 1, 1, 1)).bits
        return f"{weight}/{32 if self.activation is None else self.activation(1).bits}"

    @property
    def takes(self) -> set[str]:
        """Every name that :meth:`configure` takes."""
        return self._own | self.options.keys()

    @property
    def _own(self) -> set[str]:
        return {f.name for f in fields(self)} - {"name", "title", "reference", "stages", *_PARTS}

    def configure(self, options: Mapping[str, Any]) -> "Scheme":
        """A copy with other options: this class's own fields, keyword arguments of the quantizers, regularizers.

        The weight of a regularizer becomes that in every stage that has it, 0 switches it off. ``nonlinearity`` may be
        a name: ``"prelu"``, ``"relu"``, ``"hardtanh"`` or ``"identity"``.

        Raises UnknownName for an option or a nonlinearity that there is not, InvalidRecipe for a weight that is no
        number of at least 0, and what the quantizers raise for an impossible value.
        """
        for option in options:
            if option not in self.takes:
                raise UnknownName(f"option of the scheme {self.name!r}", option, self.takes)
        changed: dict[str, Any] = {key: value for key, value in options.items() if key in self._own}
        nonlinearity = options.get("nonlinearity")
        if isinstance(nonlinearity, str):
            if nonlinearity not in NONLINEARITIES:
                raise UnknownName(f"nonlinearity of the scheme {self.name!r}", nonlinearity, NONLINEARITIES)
            changed["nonlinearity"] = NONLINEARITIES[nonlinearity]
        elif nonlinearity is not None and not callable(nonlinearity):
            raise InvalidRecipe(
                f"the nonlinearity of the scheme {self.name!r} is {', '.join(map(repr, NONLINEARITIES))}; "
                f"got {nonlinearity!r}"
            )
        changed["stages"] = tuple(reweighed(stage, options) for stage in self.stages)
        for part in _PARTS:
            make = getattr(self, part)
            passed = {key: value for key, value in options.items() if key in _keywords(make)}
            if passed:
                changed[part] = functools.partial(make, **passed)
        configured = replace(self, **changed)
        # Makes what the options are for, so that an impossible value is told at once.
        _ = configured.bits, configured.output and configured.output(1)
        return configured


_PARTS = ("weight", "activation", "output")


def reweighed(stage: Stage, options: Mapping[str, Any]) -> Stage:
    """``stage`` with other weights for the regularizers that it has. Raises InvalidRecipe for an impossible weight."""
    weights = {name: options.get(name, weight) for name, weight in stage.regularizers.items()}
    for name, weight in weights.items():
        if not number(weight) >= 0:
            raise InvalidRecipe(f"the weight of the regularizer {name!r} is a number of at least 0; got {weight!r}")
    return replace(stage, regularizers={name: float(weight) for name, weight in weights.items()})


def _keywords(make: Callable[..., Any] | None) -> dict[str, Any]:
    if make is None:
        return {}
    parameters = inspect.signature(make).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
