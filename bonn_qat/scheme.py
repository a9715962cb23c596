"""Scheme: what "1-bit" means for a network, as frozen data.

The terms of the whole package: A binary layer keeps real-valued *latent weights*, which the optimizer updates. Each
forward pass uses their signs times a *scale*, which keeps the magnitude that a sign loses. The derivative of a sign is
zero almost everywhere, so the backward pass uses another function in its place: the *estimator*. A *quantizer* is the
module that does both, for weights or for activations. BONN learns its scale: it is the mean of a *modulation*, a
parameter with the shape of one kernel that all kernels of a layer share.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import InitVar, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from bonn_qat import functional
from bonn_qat.errors import InvalidRecipe, UnknownName
from bonn_qat.quantizers import ActivationQuantizer, WeightQuantizer, number


class PReLU(nn.PReLU):
    """``nn.PReLU`` with the backward of :func:`bonn_qat.functional.prelu`."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.prelu(input, self.weight)


def _unchanged(x: Tensor) -> Tensor:
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
NORM_POSITIONS = ("before_sign", "after_conv", "both")
PROJECTIONS = ("pool_conv", "conv_norm_pool")
EQUAL_OUTPUT: Literal["equal-output"] = "equal-output"
Start = float | Literal["equal-output"] | None
NONLINEARITIES: Mapping[str, Callable[[int], nn.Module]] = {
    "prelu": PReLU,
    "relu": _relu,
    "hardtanh": _hardtanh,
    "identity": _identity,
}
TRAINS = ("all", "norms")
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor] | None] = {
    "binary": None,
    "float": _unchanged,
    "relu": torch.relu,
    "leaky_clip": functional.leaky_clip,
    "clip": nn.functional.hardtanh,
}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of a training run.

    ``share``: the fraction of the epochs. ``regularizers``: which ones are on, with their weights. ``lr_scale``
    multiplies the learning rate. ``weights="float"`` trains the latent weights like those of a float network; the first
    binary stage after that initializes the quantizers from them again. ``activations`` names the activation function:
    ``"binary"`` is the scheme's quantizer; ``"relu"``, ``"leaky_clip"``, ``"clip"`` and ``"float"`` (none) replace it,
    as in the steps of Bi-Real Net's training. ``trains="norms"`` freezes everything but the norms. ``recompute_norms``
    ends the stage with a pass over the training set that recomputes the statistics of the batch norms.

    >>> Stage(share=0.8, regularizers={"kernel": 1e-4}).activations
    'binary'
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
            raise InvalidRecipe(
                f"a stage's share must be a fraction of the epochs, above 0 and at most 1; got {self.share}"
            )
        if not number(self.lr_scale) > 0:
            raise InvalidRecipe(f"a stage's lr_scale must be a number above 0; got {self.lr_scale}")
        for name, weight in self.regularizers.items():
            if not number(weight) >= 0:
                raise InvalidRecipe(f"the weight of {name!r} in a stage must be a number of at least 0; got {weight}")
        for name, allowed in (("weights", WEIGHTS), ("activations", ACTIVATIONS), ("trains", TRAINS)):
            if getattr(self, name) not in allowed:
                raise UnknownName(f"{name} of a stage", getattr(self, name), allowed)


class _Read(dict[str, float]):
    """Weights that were read from a scheme's stages, so that ``dataclasses.replace`` does not count as setting them."""


class _LastWeights:
    def __get__(self, scheme: "Scheme | None", owner: object = None) -> "_Read | None":
        return None if scheme is None else _Read(scheme.stages[-1].regularizers)


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How weights and activations become binary, and which modules are between the binary layers.

    ``weight`` makes a quantizer for a float weight ``(O, I, kh, kw)``. ``activation`` makes one for a layer's input,
    given the number of its channels, or 1 where that is unknown. ``None`` leaves weights or activations float; a scheme
    without ``weight`` leaves the whole network as it is. ``output``, given the channels, makes a module that follows
    each binary layer.

    ``norm``, given the channels, makes the module before each sign. ``nonlinearity``, given the channels or 1, makes
    the module that replaces each ReLU: after a ReLU every sign would be +1. ``shortcut``, ``nonlinearity_position`` and
    ``norm_position`` shape blocks that can be rebuilt, which are those with a method ``binary_form``, as in the paper's
    networks: one shortcut for each convolution (``"conv"``) or that of the float block (``"block"``); the nonlinearity
    after or before the addition; and the norms before the signs (``"before_sign"``: BONN, XNOR-Net), between the
    convolution and the addition (``"after_conv"``: Bi-Real Net, ReActNet, IR-Net, ReCU, AdaBin), or at both places.
    Other networks keep their own norms where they are, in addition to ``norm``.

    ``projection`` is the first shortcut of a rebuilt block with one for each convolution, where the shape changes:
    average pooling and a 1x1 convolution (``"pool_conv"``), or that convolution, a BN and the pooling, as in the
    ResNet-18 of BONN's authors (``"conv_norm_pool"``). Without the BN both orders compute the same, the latter with
    four times the multiplications. The float blocks of ``birealnet18`` already have the latter, and keep it.

    ``latent_std`` rescales the latent weights of each binary layer to this standard deviation, which keeps their signs;
    ``None`` keeps their scale. The quantizers start from the float weights: a scheme with a scale of its own, such as
    BONN's, keeps that scale, where one that computes it from the latents, such as XNOR-Net's, shrinks with them. With
    ``"equal-output"`` the latents get the scale at which the quantized weights have the root mean square of He's
    initialization, so that the outputs of a layer start with the same standard deviation in every scheme.

    ``regularizers`` maps names to weights, for a training of one stage; ``stages`` are for
    more. Read from a scheme, ``regularizers`` are the weights of its last stage. ``given`` is set by :meth:`configure`:
    the options that differ from the scheme's own.

    Raises UnknownName for another ``shortcut``, ``nonlinearity_position``, ``norm_position`` or ``projection``, and
    InvalidRecipe for an impossible ``latent_std`` or weight, or for both ``regularizers`` and ``stages``.

    >>> from bonn_qat.quantizers import BonnWeight, SteSign
    >>> mine = Scheme(name="mine", title="Mine", reference="ours", weight=BonnWeight, activation=SteSign,
    ...               regularizers={"kernel": 1e-4})
    >>> mine.configure({"clip": 0.5, "kernel": 1e-3}).regularizers
    {'kernel': 0.001}
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
    norm_position: Literal["before_sign", "after_conv", "both"] = "before_sign"
    projection: Literal["pool_conv", "conv_norm_pool"] = "pool_conv"
    latent_std: Start = None
    if TYPE_CHECKING:
        regularizers: dict[str, float] = field(default_factory=dict)
    else:
        regularizers: InitVar[Mapping[str, float] | None] = _LastWeights()
    stages: tuple[Stage, ...] = (Stage(),)
    given: frozenset[str] = field(default=frozenset(), repr=False, compare=False)

    def __post_init__(self, regularizers: Mapping[str, float] | None) -> None:  # type: ignore[override]
        for name, allowed in (
            ("shortcut", SHORTCUTS), ("nonlinearity_position", POSITIONS), ("norm_position", NORM_POSITIONS),
            ("projection", PROJECTIONS),
        ):  # fmt: skip
            if getattr(self, name) not in allowed:
                raise UnknownName(f"{name} of the scheme {self.name!r}", str(getattr(self, name)), allowed)
        if self.latent_std not in (None, EQUAL_OUTPUT) and not number(self.latent_std) > 0:
            raise InvalidRecipe(
                f"the latent_std of the scheme {self.name!r} must be a number above 0, or {EQUAL_OUTPUT!r}; "
                f"got {self.latent_std!r}"
            )
        if regularizers is None or isinstance(regularizers, _Read):
            return
        if not isinstance(regularizers, Mapping):
            raise InvalidRecipe(
                f"the regularizers of the scheme {self.name!r} map names to weights, such as {{'kernel': 1e-4}}; "
                f"got {regularizers!r}"
            )
        if self.stages != (Stage(),):
            raise InvalidRecipe(
                f"the scheme {self.name!r} has both regularizers and stages; with stages, write "
                "Stage(regularizers={...}) for each"
            )
        object.__setattr__(self, "stages", (Stage(regularizers=dict(regularizers)),))

    @property
    def options(self) -> dict[str, Any]:
        """Names and defaults of the options beyond the scheme's own fields.

        They are the keyword-only arguments of its quantizers' factories, and the regularizers of its stages, each with
        the weight of the last stage that has it.
        """
        options = {name: weight for stage in self.stages for name, weight in stage.regularizers.items()}
        return {name: value for part in _PARTS for name, value in _keywords(getattr(self, part)).items()} | options

    @property
    def bits(self) -> str:
        """Bits of weights and activations, such as ``"1/1"``; 32 is float."""
        weight = 32 if self.weight is None else self.weight(torch.ones(2, 1, 1, 1)).bits
        return f"{weight}/{32 if self.activation is None else self.activation(1).bits}"

    @property
    def start(self) -> str:
        """``latent_std`` as the ``latents`` of a recipe: ``"float"``, ``"equal-output"``, or a number."""
        if self.latent_std is None or isinstance(self.latent_std, str):
            return self.latent_std or "float"
        short = f"{self.latent_std:g}"
        return short if float(short) == self.latent_std else repr(float(self.latent_std))

    @property
    def takes(self) -> set[str]:
        """Every name that :meth:`configure` takes."""
        return self._own | self.options.keys()

    @property
    def _own(self) -> set[str]:
        return set() if self.weight is None else _FIELDS

    def configure(self, options: Mapping[str, Any]) -> "Scheme":
        """A copy with other options: fields of this class, keyword arguments of the quantizers, regularizers.

        The weight of a regularizer is set in every stage that has it; 0 switches it off. ``nonlinearity`` may be a
        name: ``"prelu"``, ``"relu"``, ``"hardtanh"`` or ``"identity"``. :func:`bonn_qat.binarize` refuses a model on
        which an option that was set here has no effect.

        Raises UnknownName for an unknown option or nonlinearity, InvalidRecipe for an impossible value, and whatever
        the quantizers raise for one.
        """
        for option in options:
            if option not in self.takes:
                raise UnknownName(f"option of the scheme {self.name!r}", option, self.takes)
        changed: dict[str, Any] = {key: value for key, value in options.items() if key in self._own}
        nonlinearity, norm = options.get("nonlinearity"), options.get("norm")
        if isinstance(nonlinearity, str):
            if nonlinearity not in NONLINEARITIES:
                raise UnknownName(f"nonlinearity of the scheme {self.name!r}", nonlinearity, NONLINEARITIES)
            changed["nonlinearity"] = NONLINEARITIES[nonlinearity]
        elif nonlinearity is not None and not callable(nonlinearity):
            raise InvalidRecipe(
                f"the nonlinearity of the scheme {self.name!r} must be {', '.join(map(repr, NONLINEARITIES))}; "
                f"got {nonlinearity!r}"
            )
        if norm is not None and not callable(norm):
            raise InvalidRecipe(
                f"the norm of the scheme {self.name!r} must be a class or function that makes a module for a number of "
                f"channels; got {norm!r}"
            )
        defaults = self.options | {key: getattr(self, key) for key in self._own}
        different = {key for key, value in {**options, **changed}.items() if value != defaults[key]}
        changed["given"] = self.given | different
        changed["stages"] = tuple(reweighed(stage, options) for stage in self.stages)
        for part in _PARTS:
            make = getattr(self, part)
            passed = {key: value for key, value in options.items() if key in _keywords(make)}
            if passed:
                changed[part] = functools.partial(make, **passed)
        configured = replace(self, **changed)
        # Calls the factories, so that an impossible value is reported at once.
        _ = configured.bits, configured.output and configured.output(1)
        return configured


class WatchedScheme(Scheme):
    """A copy of a scheme that records which of its fields are read while a model is binarized."""

    @classmethod
    def of(cls, scheme: Scheme) -> "WatchedScheme":
        """Start to watch."""
        watched = object.__new__(cls)
        watched.__dict__.update(vars(scheme), _reads=set())
        return watched

    def __getattribute__(self, name: str) -> Any:
        if name in _FIELDS or name in _PARTS:
            self.__dict__.get("_reads", set()).add(name)
        return super().__getattribute__(name)

    @property
    def unused(self) -> set[str]:
        """The ``given`` options that were not read; those of regularizers are not needed before the training."""
        own = self.__dict__
        parts = {key: part for part in _PARTS for key in _keywords(own[part])} | {name: name for name in _FIELDS}
        parts["latent_std"] = "weight"  # which is read for each binary layer
        return {key for key in own["given"] if key in parts and parts[key] not in own["_reads"]}


_PARTS = ("weight", "activation", "output")
_FIELDS = {f.name for f in fields(Scheme)} - {"name", "title", "reference", "stages", "given", *_PARTS}


def reweighed(stage: Stage, options: Mapping[str, Any]) -> Stage:
    """``stage`` with other weights for the regularizers that it has. Raises InvalidRecipe for an impossible weight."""
    weights = {name: options.get(name, weight) for name, weight in stage.regularizers.items()}
    for name, weight in weights.items():
        if not number(weight) >= 0:
            raise InvalidRecipe(
                f"the weight of the regularizer {name!r} must be a number of at least 0; got {weight!r}"
            )
    return replace(stage, regularizers={name: float(weight) for name, weight in weights.items()})


def _keywords(make: Callable[..., Any] | None) -> dict[str, Any]:
    if make is None:
        return {}
    parameters = inspect.signature(make).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
