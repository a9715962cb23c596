"""Recipe: everything that one training run depends on, as frozen data, read from TOML."""

import importlib.resources
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from bonn_qat.errors import InvalidRecipe
from bonn_qat.files import plain
from bonn_qat.files.validate import Allowed, OneOf, check_values, read_as, read_toml
from bonn_qat.scheme import EQUAL_OUTPUT, Stage, Start

SCHEDULES = ("constant", "cosine", "one_cycle", "step")
OPTIMIZERS = ("sgd", "adam")
AUGMENTATIONS = ("crop", "resized_crop")
COMPILE = ("", "default", "reduce-overhead", "max-autotune")
NORM_STARTS = ("one", "uniform")
PRECISIONS = ("float32", "tf32", "bfloat16", "float16")
_LONGEST_NAME = 200  # bytes; a file's name has 255, and others are made of it
# Arguments of timm.create_model that name files, or where to find them.
_FILES = ("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
Positive = Annotated[int, Allowed("at least 1, below 2**31", lambda n: 1 <= n < 2**31)]
Count = Annotated[int, Allowed("at least 0, below 2**31", lambda n: 0 <= n < 2**31)]
AboveZero = Annotated[float, Allowed("a number above 0", lambda x: 0 < x < math.inf)]
AtLeastZero = Annotated[float, Allowed("at least 0", lambda x: 0 <= x < math.inf)]
Fraction = Annotated[float, Allowed("at least 0, below 1", lambda x: 0 <= x < 1)]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run: model, scheme, data, seed, optimizer, schedule and stages.

    ``model`` is the name of a timm model; ``data`` is a name of :mod:`bonn_qat.training.data` or the path of an image
    folder. ``train_images`` and ``test_images`` take a fixed random part of the data, 0 all of it.
    ``validation_images`` of the training images are held out and replace the test set, for a search that must not see
    it. ``latents`` is how the latent weights (the float weights that are trained, whose signs are the binary weights)
    start: ``"scheme"`` as the scheme says, ``"float"`` as in the float network, scaled to a standard deviation such as
    ``"0.01"``, or ``"equal-output"`` (:class:`bonn_qat.Scheme`). Equal latents are not equal outputs: with ``"0.01"``
    BONN's first layer in WRN-22 has a scale of 0.093, from the float weights, and XNOR-Net's 0.008, from its latents.
    ``norm_start`` is where the scales (gamma) of all batch norms start: at ``"one"``, or ``"uniform"``, each drawn from
    U(0, 1), as in the code of wide residual networks and in PyTorch up to 1.1; not in a network that starts from a
    ``checkpoint`` or from pretrained weights. A norm of the same name starts alike in every scheme.

    ``nesterov`` is Nesterov's form of ``momentum``; without momentum and with Adam it has no effect. ``norm_decay``
    extends the weight decay to norms, biases, PReLU slopes and the scales that schemes learn, as the training code of
    wide residual networks and of most baselines has it; without it only weights with two axes or more decay.
    ``augmentation`` of an image folder is ``"crop"`` (resize, random crop and flip, as in BONN's paper) or
    ``"resized_crop"`` (timm's: random scale and aspect ratio, flip and colour jitter).

    ``momentum`` is that of SGD, and Adam's first beta.

    ``schedule`` shapes the learning rate over all epochs: ``one_cycle`` (a linear rise for the fraction ``warmup``,
    then a cosine down), ``cosine``, ``constant``, or ``step``: multiplied by ``gamma`` at each of the ``milestones``
    (epochs); with ``factors``, one for each milestone, the rate from there on is ``factor * lr``, so it can rise again.

    ``regularizer_options`` are keyword arguments of the regularizers, such as ``{"kernel": {"nu": 1e-3}}``. Without
    ``stages`` the scheme's are used. ``checkpoint`` is a safetensors file with the state dict to start from, of the
    float network or of a binary one, such as the weights beside a comparison's results. ``teacher`` is the weights file
    of any network with the same classes, or the state dict of the float network; its logits at ``temperature`` then
    make up the part ``distillation`` of the task's loss (timm's ``LogitDistillationTask``). Both may be names of
    trained networks, such as ``"wrn22_16.float_cifar10"``.

    For speed: ``channels_last`` is the memory format of convolutions, ``compile`` a mode of ``torch.compile`` for
    network and losses (``"reduce-overhead"`` uses CUDA graphs; empty does not compile), and ``precision`` that of the
    products in a training step: ``"float32"``, ``"tf32"`` on a GPU, or under autocast ``"bfloat16"`` on a GPU and on a
    CPU that has instructions for it, or ``"float16"`` with a scaled loss. In all of them the integer sums of binary
    layers are exact, and rounded once when they are scaled; losses, statistics of norms, weights and checkpoints are
    float32. So are the test and recomputed norms, because the weights file and the packed network compute in it.

    ``sync_norms`` gives batch norms the statistics of the whole batch when a run has several processes; without it
    each process uses its own, which is faster but makes the result depend on the number of processes.

    Recipes may be untrusted: ``model_options`` must not name files, and tables hold only plain data.

    >>> Recipe(model="resnet18", scheme="xnor", epochs=90).name
    'xnor-scheme-seed0'

    Raises InvalidRecipe for an impossible value, UnknownName for an unknown schedule, optimizer, mode or precision.
    """

    model: str = "wrn10_16"
    scheme: str = "bonn"
    data: str = "digits"
    seed: Annotated[int, Allowed("at least 0, below 2**63", lambda n: 0 <= n < 2**63)] = 0
    epochs: Positive = 30
    batch_size: Positive = 64
    optimizer: Annotated[str, OneOf(OPTIMIZERS)] = "sgd"
    lr: AboveZero = 0.05
    momentum: Fraction = 0.9
    nesterov: bool = True
    weight_decay: AtLeastZero = 5e-4
    norm_decay: bool = False
    modulation_lr_scale: AboveZero = 0.1
    modulation_decay_scale: AtLeastZero = 1.0
    schedule: Annotated[str, OneOf(SCHEDULES)] = "one_cycle"
    warmup: Fraction = 0.3
    milestones: Annotated[
        tuple[int, ...], Allowed("epochs, at least 1", lambda epochs: all(0 < n < 2**31 for n in epochs))
    ] = ()
    gamma: AboveZero = 0.2
    factors: Annotated[
        tuple[float, ...], Allowed("numbers above 0", lambda factors: all(0 < f < math.inf for f in factors))
    ] = ()
    label_smoothing: Fraction = 0.0
    augment: bool = True
    augmentation: Annotated[str, OneOf(AUGMENTATIONS)] = "crop"
    train_images: Count = 0
    test_images: Count = 0
    validation_images: Count = 0
    latents: str = "scheme"
    norm_start: Annotated[str, OneOf(NORM_STARTS)] = "one"
    skip: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    model_options: Mapping[str, Any] = field(default_factory=dict)
    scheme_options: Mapping[str, Any] = field(default_factory=dict)
    regularizer_options: Mapping[str, Any] = field(default_factory=dict)
    stages: tuple[Stage, ...] = ()
    checkpoint: str = ""
    teacher: str = ""
    distillation: Annotated[float, Allowed("0 to 1", lambda part: 0 <= part <= 1)] = 0.5
    temperature: AboveZero = 4.0
    channels_last: bool = True
    compile: Annotated[str, OneOf(COMPILE)] = ""
    precision: Annotated[str, OneOf(PRECISIONS)] = "float32"
    sync_norms: bool = True

    def __post_init__(self) -> None:
        self._check_plain()
        check_values(self, " in the recipe")
        factors = len(self.factors) in (0, len(self.milestones))
        _check(factors, "factors", self.factors, "one for each milestone, or none")
        finite = len(self.milestones) * math.log(self.gamma) < math.log(sys.float_info.max)
        _check(finite, "gamma", self.gamma, "a number whose power for all milestones is finite")
        for name, options in self.regularizer_options.items():
            _check(isinstance(options, Mapping), f"regularizer_options.{name}", options, "a table of its arguments")
        if self.stages and abs(sum(stage.share for stage in self.stages) - 1) > 1e-6:
            raise InvalidRecipe(f"the shares of the stages add up to {sum(s.share for s in self.stages):g}, not to 1")
        _ = self.latent_std
        if (length := len(self.name.encode())) > _LONGEST_NAME:
            raise InvalidRecipe(
                f"the name of the run, {plain.shown(self.name)}, has {length} bytes; a file name can have "
                f"{_LONGEST_NAME}: give the scheme fewer or shorter options"
            )

    def _check_plain(self) -> None:
        """Raise InvalidRecipe for values that TOML cannot hold, null characters, and options that name files."""
        for name, value in vars(self).items():
            if name == "stages":
                continue
            try:
                plain.check(value)
            except ValueError as error:
                raise InvalidRecipe(f"{name} in the recipe holds a value that no recipe can hold: {error}") from error
            for item in _leaves(value):
                _check(not isinstance(item, str) or "\0" not in item, name, item, "strings without the null character")
                _check(not isinstance(item, float) or not math.isnan(item), name, item, "numbers other than NaN")
        for name in _FILES:
            given = self.model_options.get(name)
            allowed = "nothing; to start from a safetensors file, set the recipe's key checkpoint"
            _check(not given, f"model_options.{name}", given, allowed)

    @property
    def name(self) -> str:
        """The name of the run, unique within a comparison, and of its files."""
        return re.sub(r"[^\w.,=+-]", "_", f"{self.scheme_spec}-{self.latents}-seed{self.seed}")

    @property
    def scheme_spec(self) -> str:
        """The scheme with its options: ``xnor``, or ``xnor:gradient=plain+input_scale=true``."""
        options = (f"{name}={value if isinstance(value, str) else json.dumps(value)}"
                   for name, value in sorted(self.scheme_options.items()))  # fmt: skip
        return ":".join(filter(None, (self.scheme, "+".join(options))))

    def with_scheme(self, spec: str) -> "Recipe":
        """A copy with the scheme and the options of ``spec``, which are added to the recipe's own.

        Values are TOML, where the quotes of a string may be left out.

        >>> Recipe().with_scheme("xnor:gradient=plain+input_scale=true").scheme_options
        {'gradient': 'plain', 'input_scale': True}

        Raises InvalidRecipe for an option without a value.
        """
        scheme, _, options = spec.partition(":")
        given: dict[str, Any] = {}
        for option in filter(None, options.split("+")):
            name, equals, text = option.partition("=")
            if not equals or not text:
                raise InvalidRecipe(f"the option {option!r} in {spec!r} has no value; write {name}=VALUE")
            given[name] = plain.toml_value(text)
        return replace(self, scheme=scheme, scheme_options={**self.scheme_options, **given})

    @property
    def latent_std(self) -> Start:
        """``latents`` as a scheme has it, None for ``"scheme"`` and ``"float"``. Raises InvalidRecipe if impossible."""
        if self.latents in ("scheme", "float"):
            return None
        if self.latents == EQUAL_OUTPUT:
            return EQUAL_OUTPUT
        try:
            std = float(self.latents)
        except ValueError:
            std = -1.0
        _check(
            0 < std < float("inf"),
            "latents",
            self.latents,
            "'scheme', 'float', 'equal-output' or a standard deviation above 0",
        )
        return std

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain data, for JSON and TOML; :meth:`from_dict` is the inverse."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Recipe":
        """Raises UnknownName for a key that no recipe has, InvalidRecipe for a value of the wrong type."""
        try:
            plain.check(content)
        except ValueError as error:
            raise InvalidRecipe(f"this is not a recipe: {error}") from error
        return read_as(cls, content)

    @classmethod
    def from_toml(cls, path: str | Path) -> "Recipe":
        """Read a recipe. Raises InvalidRecipe naming the file, and whatever :meth:`from_dict` raises."""
        return cls.from_dict(read_toml(path, "recipe"))

    @classmethod
    def default(cls, data: str) -> "Recipe":
        """The package's recipe for a data set, or else the one for image folders with this ``data``."""
        recipes = importlib.resources.files("bonn_qat.training") / "recipes"
        file = recipes / f"{data}.toml"
        with importlib.resources.as_file(file if file.is_file() else recipes / "folder.toml") as path:
            return replace(cls.from_toml(path), data=data)


def _check(holds: bool, name: str, given: object, allowed: str) -> None:
    if not holds:
        raise InvalidRecipe(f"{name} in the recipe is {plain.shown(given)}; allowed: {allowed}")


def _leaves(value: Any) -> Iterator[Any]:
    """All values within nested tables and lists, and the keys of tables."""
    if isinstance(value, Mapping):
        yield from value
        value = value.values()
    elif not isinstance(value, list | tuple):
        yield value
        return
    for item in value:
        yield from _leaves(item)
